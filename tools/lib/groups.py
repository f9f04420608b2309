"""What must not be parted: groups of pictures that share a patient, a scene or their pixels."""

from collections import defaultdict

from data import open_source


def open_data(root):
    """Everything below a data root as a Source; slices whose patient is unknown cannot be kept apart."""
    source = open_source(root)
    if source.encoding != "photo" and any(name[0] == "/" or name[-1] == "/" for name in source.groups):
        raise ValueError(f"{root}: the index has slices without dataset or patient; preprocess again")
    return source


def join(names, sets):
    """Union-find: lists of names that any of `sets` links, each sorted, ordered by their first name."""
    parent = {name: name for name in names}

    def find(name):
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for members in sets:
        for other in members[1:]:
            parent[find(other)] = find(members[0])
    units = defaultdict(list)
    for name in sorted(parent):
        units[find(name)].append(name)
    return sorted(units.values())
