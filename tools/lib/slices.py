"""Names of slices for people and tables, and the look-up of a slice by its name.

i = find_slice(source, row["path"], row["z"])
slice_name(source, i)
"""

import functools


def find_slice(source, path, z=None):
    """Row of a slice by its path and z (None: the middle one of a volume); None where it is not there."""
    rows = slices_by_name(source).get(path, {})
    return rows.get(int(z)) if z is not None else list(rows.values())[len(rows) // 2] if rows else None


@functools.lru_cache(maxsize=4)
def slices_by_name(source):
    """{path: {z: row}}; of photographs z is 0."""
    paths, index = source.rows.column("path").tolist(), {}
    zs = source.rows.column("z").tolist() if source.encoding != "photo" else [0] * len(paths)
    for i, (name, z) in enumerate(zip(paths, zs)):
        index.setdefault(name.decode(), {})[z] = i
    return index


def slice_name(source, i):
    """How a slice is named for people and in files: its path, in a volume with #z."""
    row = source.rows[i]
    return f"{row['path']}#{row['z']}" if source.encoding == "hu16-v1" else row["path"]
