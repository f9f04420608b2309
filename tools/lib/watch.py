"""The martingale over what a classifier says, kept in a file from call to call: is the guarantee still one?

state = read_watch(path) if path.exists() else begin(reference, probabilities, policy)     # table of val_calib
before = state["seen"]; watch(state, table, probabilities, when); write_json(path, state)
out = revoked(out, state, before)                               # decisions after the loss are left to others
"""

import numpy as np

from tools.lib import martingale
from tools.lib.cli import shown
from tools.lib.files import read_json_file

FIELDS = {"names": list, "delta": float, "seen": int, "lost": (dict, type(None)), "most": float, "scores": list,
          "capital": list, "last": (float, type(None)), "weights_sha256": str, "guarantee": str}  # fmt: skip
REMEDY = "remove it, and the watch begins anew with --calibration"


def scores_of(probabilities, classes):
    """(scores [N, S], their names): how unsure, and of two classes how much the second."""
    odd, names = [1 - probabilities.max(1)], ["doubt"]
    if len(classes) == 2:
        odd, names = [*odd, probabilities[:, 1]], [*names, f"p of {classes[1]}"]
    return np.stack(odd, 1), names


def begin(reference, probabilities, policy, delta=0.01):
    """State before the first picture; reference: table of val_calib, with its probabilities by the same policy."""
    state = martingale.begin(*scores_of(probabilities, reference.facts["classes"]), delta)
    guarantee = policy["guarantee"] if policy else "none"
    return state | {"weights_sha256": reference.facts["weights_sha256"], "guarantee": guarantee}


def read_watch(path):
    state = read_json_file(path, FIELDS, REMEDY, martingale.VERSION)
    sides = len(state["names"]), len(state["scores"]), len(state["capital"])
    if len(set(sides)) != 1 or not state["delta"] > 0:
        raise ValueError(f"{path} holds {sides} names, scores and capitals; {REMEDY}")
    return state


def watch(state, table, probabilities, when):
    """Play on with the samples of a table -> wealth after each; state is changed."""
    if table.facts["weights_sha256"] != state["weights_sha256"]:
        raise ValueError(f"the watch is of weights {shown(state['weights_sha256'])[:12]}, these are others; {REMEDY}")
    scores, names = scores_of(probabilities, table.facts["classes"])
    if names != state["names"]:
        raise ValueError(f"the watch is of {shown(state['names'])}, these are {shown(names)}; {REMEDY}")
    return martingale.follow(state, scores, table.ids, when)


def revoked(out, state, before):
    """Decisions [N] of samples that came after the loss are left to others; before: samples seen before this table."""
    if not state["lost"]:
        return out
    after = np.arange(before + 1, before + 1 + len(out.decision)) >= state["lost"]["picture"]
    sets, decision = out.sets.copy(), out.decision.copy()
    sets[after], decision[after] = True, -1
    return out._replace(sets=sets, decision=decision)


def in_words(state):
    """A sentence for people."""
    if state["lost"]:
        when = f" ({state['lost']['when']})" if state["lost"]["when"] else ""
        what = "" if state["guarantee"] == "none" else f": the guarantee ({state['guarantee']}) no longer holds"
        return f"exchangeability lost at picture {state['lost']['picture']:,}{when}{what}"
    return (f"no sign against exchangeability in {state['seen']:,} pictures (wealth {state['last'] or 1:.3g}, at most "
            f"{state['most']:.3g}; lost at {1 / state['delta']:g})")  # fmt: skip


def gauges(state):
    where = state["lost"]["picture"] if state["lost"] else -1
    found = {"drift_exchangeable": int(state["lost"] is None), "drift_wealth": state["last"] or 1.0}
    return found | {"drift_watched": state["seen"], "drift_lost_at": where}
