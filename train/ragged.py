"""Sources of records that differ in size, padded to one: point clouds and graphs."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.records import Prepare, Record, Source, describe, files_below, sampled, sha256, spread

CLOUDS = (".npy", ".npz", ".off", ".ply")


@dataclasses.dataclass(frozen=True)
class _PointClouds:
    """A source over clouds of any size, padded to one."""

    items: tuple[Any, ...]
    labels: np.ndarray | None
    classes: tuple[str, ...] | None
    num_points: int
    fields: tuple[str, ...]
    root: str | None
    prepare: Prepare | None

    @property
    def name(self) -> str:
        return f"point_clouds({'...' if self.root is None else repr(self.root)})"

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Record:
        cloud = _cloud(self.items[index], self.root, self.fields)
        count = len(cloud["points"])
        # A cloud with too many points is thinned evenly, the first and the last point kept.
        rows = np.arange(count) if count <= self.num_points else spread(count, self.num_points)
        record = {}
        for name, value in cloud.items():
            record[name] = _padded(value[rows], self.num_points) if name in self.fields else value
        record["mask"] = np.arange(self.num_points) < len(rows)
        if self.labels is not None:
            record["label"] = np.asarray(self.labels[index])
        return record if self.prepare is None else self.prepare(record)

    def digest(self) -> str:
        """Returns a SHA-256 of the names and of evenly spread clouds."""
        names = [str(item) for item in self.items] if self.root is not None else []
        labels = "none" if self.labels is None else sha256({"label": self.labels})
        description = f"{names} {labels} {self.classes} {self.num_points} {len(self)} {describe(self.prepare)}"
        return sampled(description, self)


def point_clouds(
    clouds: str | Path | Sequence[Any],
    *,
    num_points: int | None = None,
    labels: Sequence[int] | np.ndarray | None = None,
    fields: Sequence[str] = ("points", "features", "normals", "colors"),
    prepare: Prepare | None = None,
) -> Source:
    """Makes a source of point clouds that differ in their number of points, each padded with zeros to `num_points`.

    Args:
        clouds: a folder of `.npy` (`[points, dimensions]`), `.npz` (an array "points" and others), `.ply` or `.off`
            files (their vertices), straight in it or with one subfolder a class; or a sequence of arrays `[points,
            dimensions]` or of mappings with an entry "points".
        num_points: points of every record; None takes the largest cloud, for which all clouds are read once. A cloud
            with more is thinned evenly in its stored order.
        labels: the label of each cloud, where folders do not say.
        fields: the entries with one row a point, which are padded; others stay as they are.
        prepare: a deterministic step for every record, before any random transform.

    Returns:
        A source of records `{"points": float32 [num_points, dimensions], "mask": bool [num_points], "label": int32}`
        (`mask` is True for a real point; a label where there is one), with the attribute `classes`.

    Raises:
        FileNotFoundError: if the folder or its clouds are missing.
        ValueError: if there is no cloud, a size is out of range, or the labels do not fit.
    """
    if isinstance(clouds, str | Path):
        items: tuple[Any, ...]
        items, found, classes = _find(Path(clouds), CLOUDS, "point cloud", labels is None)
        root: str | None = str(clouds)
    else:
        items, found, classes, root = tuple(clouds), None, None, None
    if not items:
        raise ValueError("clouds must hold at least one cloud, got none; pass a folder or a sequence of arrays")
    if labels is not None:
        found = np.asarray(labels)
        if len(found) != len(items):
            raise ValueError(f"labels must have one entry a cloud ({len(items)}), got {len(found)}; set labels")
        found = found.astype(np.int32) if found.dtype.kind in "iub" else found
    padded = tuple(fields)
    if num_points is None:
        num_points = max(len(_cloud(item, root, padded)["points"]) for item in items)
    if num_points < 1:
        raise ValueError(f"num_points={num_points} must be at least 1; set num_points")
    return _PointClouds(items, found, classes, int(num_points), padded, root, prepare)


def point_cloud_buckets(
    clouds: str | Path | Sequence[Any],
    sizes: Sequence[int],
    *,
    labels: Sequence[int] | np.ndarray | None = None,
    fields: Sequence[str] = ("points", "features", "normals", "colors"),
    prepare: Prepare | None = None,
) -> dict[int, Source]:
    """Sorts clouds into one source a size: each cloud goes to the smallest size that holds it.

    All batches of a source have one shape, so every size is compiled once. A cloud larger than the largest size is
    thinned to it. Arguments are those of `point_clouds`; all clouds are read once.

    Args:
        clouds: as for `point_clouds`.
        sizes: numbers of points.
        labels: as for `point_clouds`.
        fields: as for `point_clouds`.
        prepare: as for `point_clouds`.

    Returns:
        The sources by size, without those that would be empty.

    Raises:
        FileNotFoundError: as for `point_clouds`.
        ValueError: as for `point_clouds`, or if there is no size.
    """
    if not sizes:
        raise ValueError("sizes must hold at least one number of points, got none; set sizes")
    ordered = sorted(set(sizes))
    whole = point_clouds(clouds, num_points=ordered[-1], labels=labels, fields=fields, prepare=prepare)
    assert isinstance(whole, _PointClouds)
    counts = np.array([len(_cloud(item, whole.root, whole.fields)["points"]) for item in whole.items])
    bucket = np.minimum(np.searchsorted(ordered, counts), len(ordered) - 1)
    return {
        size: dataclasses.replace(
            whole,
            items=tuple(whole.items[index] for index in np.flatnonzero(bucket == number)),
            labels=None if whole.labels is None else whole.labels[bucket == number],
            num_points=size,
        )
        for number, size in enumerate(ordered)
        if (bucket == number).any()
    }


@dataclasses.dataclass(frozen=True)
class _Graphs:
    """A source over graphs of any size, padded to one."""

    items: tuple[Any, ...]
    labels: np.ndarray | None
    classes: tuple[str, ...] | None
    max_nodes: int
    max_edges: int
    node_fields: tuple[str, ...]
    edge_fields: tuple[str, ...]
    root: str | None
    prepare: Prepare | None

    @property
    def name(self) -> str:
        return f"graphs({'...' if self.root is None else repr(self.root)})"

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Record:
        graph = _graph(self.items[index], self.root, self.node_fields, self.edge_fields)
        nodes, edges = _graph_size(graph, self.node_fields)
        if nodes > self.max_nodes or edges > self.max_edges:
            raise ValueError(
                f"graph {index} of {self.name} has {nodes} nodes and {edges} edges, more than max_nodes="
                f"{self.max_nodes} or max_edges={self.max_edges}; raise them"
            )
        spare = min(nodes, self.max_nodes - 1)  # a padding node where there is one
        record = {}
        for name, value in graph.items():
            if name in self.node_fields:
                record[name] = _padded(value, self.max_nodes)
            elif name in self.edge_fields:
                record[name] = _padded(value, self.max_edges)
            elif name in ("senders", "receivers"):
                record[name] = _padded(value, self.max_edges, spare)
            else:
                record[name] = value
        record["node_mask"] = np.arange(self.max_nodes) < nodes
        record["edge_mask"] = np.arange(self.max_edges) < edges
        if self.labels is not None:
            record["label"] = np.asarray(self.labels[index])
        return record if self.prepare is None else self.prepare(record)

    def digest(self) -> str:
        """Returns a SHA-256 of the names and of evenly spread graphs."""
        names = [str(item) for item in self.items] if self.root is not None else []
        labels = "none" if self.labels is None else sha256({"label": self.labels})
        return sampled(f"{names} {labels} {self.classes} {len(self)} {describe(self.prepare)}", self)


def graphs(
    graphs: str | Path | Sequence[Mapping[str, Any]],
    *,
    max_nodes: int | None = None,
    max_edges: int | None = None,
    labels: Sequence[int] | np.ndarray | None = None,
    node_fields: Sequence[str] = ("nodes", "positions"),
    edge_fields: Sequence[str] = ("edges",),
    prepare: Prepare | None = None,
) -> Source:
    """Makes a source of graphs that differ in size, each padded to `max_nodes` and `max_edges`.

    Args:
        graphs: a folder of `.npz` files, straight in it or with one subfolder a class, or a sequence of mappings. A
            graph has `senders` and `receivers`, whole numbers `[edges]`, at least one entry of `node_fields`, and
            maybe entries of `edge_fields` and others (`label`, `globals`), which stay as they are.
        max_nodes: nodes of every record; None takes the largest graph, for which all graphs are read once.
        max_edges: edges of every record; None takes the most.
        labels: the label of each graph, where folders do not say.
        node_fields: the entries with one row a node.
        edge_fields: the entries with one row an edge.
        prepare: a deterministic step for every record, before any random transform.

    Returns:
        A source of records with the graph's entries and `node_mask` `[max_nodes]`, `edge_mask` `[max_edges]`, True for
        what is real. Padding is zero; padding edges join a padding node to itself (the last node, if there is none),
        so that without a mask they reach no real node of a graph smaller than `max_nodes`.

    Raises:
        FileNotFoundError: if the folder or its graphs are missing.
        ValueError: if there is no graph, an entry is missing or does not fit, or a graph is too large.
    """
    if isinstance(graphs, str | Path):
        items: tuple[Any, ...]
        items, found, classes = _find(Path(graphs), (".npz",), "graph", labels is None)
        root: str | None = str(graphs)
    else:
        items, found, classes, root = tuple(graphs), None, None, None
    if not items:
        raise ValueError("graphs must hold at least one graph, got none; pass a folder or a sequence of mappings")
    if labels is not None:
        found = np.asarray(labels)
        if len(found) != len(items):
            raise ValueError(f"labels must have one entry a graph ({len(items)}), got {len(found)}; set labels")
        found = found.astype(np.int32) if found.dtype.kind in "iub" else found
    of_nodes, of_edges = tuple(node_fields), tuple(edge_fields)
    if max_nodes is None or max_edges is None:
        sizes = np.array([_graph_size(_graph(item, root, of_nodes, of_edges), of_nodes) for item in items])
        max_nodes = int(sizes[:, 0].max()) if max_nodes is None else max_nodes
        max_edges = max(int(sizes[:, 1].max()), 1) if max_edges is None else max_edges
    if max_nodes < 1 or max_edges < 1:
        raise ValueError(f"max_nodes={max_nodes} and max_edges={max_edges} must be at least 1; set both")
    return _Graphs(items, found, classes, int(max_nodes), int(max_edges), of_nodes, of_edges, root, prepare)


def _find(
    root: Path, endings: Sequence[str], what: str, by_class: bool
) -> tuple[tuple[str, ...], np.ndarray | None, tuple[str, ...] | None]:
    """Returns the files of a folder, and labels and classes if it has one subfolder a class."""
    layout = f"{root}/<name>{endings[0]} or {root}/<class>/<name>{endings[0]}"
    if not root.is_dir():
        raise FileNotFoundError(
            f"{what} folder {root} must exist and hold {layout}, got nothing there; "
            f"unpack the files there, for example with: mkdir -p {root} && tar -xf files.tar -C {root}"
        )
    files = files_below(root, endings)
    if not files:
        raise FileNotFoundError(f"{what} folder {root} must hold {', '.join(endings)} files, got none; fill {layout}")
    tops = [Path(file).parts[0] if len(Path(file).parts) > 1 else "" for file in files]
    classes = tuple(sorted(set(tops)))
    if classes == ("",) or not by_class:
        return tuple(files), None, None
    if "" in classes:
        raise ValueError(
            f"{what} folder {root} must hold either files or one subfolder a class, got both; move {files[0]}"
        )
    return tuple(files), np.asarray([classes.index(top) for top in tops], np.int32), classes


def _padded(value: np.ndarray, length: int, fill: float = 0) -> np.ndarray:
    """Returns an array lengthened along axis 0."""
    result = np.full((length, *value.shape[1:]), fill, value.dtype)
    result[: len(value)] = value
    return result


def _plain(value: Any) -> np.ndarray:
    """Returns an array with floats as float32 and whole numbers as int32."""
    array = np.asarray(value)
    return array.astype({"f": np.float32, "i": np.int32, "u": np.int32}.get(array.dtype.kind, array.dtype))


def _cloud(item: Any, root: str | None, fields: Sequence[str]) -> Record:
    """Reads one point cloud."""
    if root is not None:
        path = Path(root, item)
        reader = {".npy": _read_npy, ".npz": _read_npz, ".off": _read_off, ".ply": _read_ply}[path.suffix.lower()]
        raw: Mapping[str, Any] = reader(path)
        place = str(path)
    else:
        raw, place = (item if isinstance(item, Mapping) else {"points": item}), "a cloud"
    cloud = {name: _plain(value) for name, value in raw.items()}
    if "points" not in cloud or cloud["points"].ndim != 2:
        shape = cloud["points"].shape if "points" in cloud else "none"
        raise ValueError(f"{place} must have points [points, dimensions], got shape {shape}; store them as 'points'")
    for name in set(fields) & set(cloud):
        if len(cloud[name]) != len(cloud["points"]):
            raise ValueError(
                f"{place} must have one row of {name!r} a point ({len(cloud['points'])}), got {len(cloud[name])}; "
                f"take {name!r} out of fields"
            )
    return cloud


def _graph(item: Any, root: str | None, node_fields: Sequence[str], edge_fields: Sequence[str]) -> Record:
    """Reads one graph."""
    place = "a graph" if root is None else str(Path(root, item))
    graph = {k: _plain(v) for k, v in (item if root is None else _read_npz(Path(root, item))).items()}
    lacking = [name for name in ("senders", "receivers") if name not in graph]
    if lacking or not set(node_fields) & set(graph):
        raise ValueError(
            f"{place} must have senders, receivers and one of {list(node_fields)}, got {sorted(graph)}; "
            "rename its arrays or set node_fields"
        )
    nodes, edges = _graph_size(graph, node_fields)
    for name, length in [(n, nodes) for n in node_fields] + [(n, edges) for n in (*edge_fields, "receivers")]:
        if name in graph and len(graph[name]) != length:
            raise ValueError(f"{place} must have {length} rows of {name!r}, got {len(graph[name])}; correct the file")
    ends = np.concatenate([graph["senders"], graph["receivers"]])
    if len(ends) and not (ends.dtype.kind == "i" and ends.min() >= 0 and ends.max() < nodes):
        raise ValueError(f"{place} must join nodes 0..{nodes - 1}, got {ends.min()}..{ends.max()}; correct senders")
    for name in ("senders", "receivers"):
        graph[name] = graph[name].astype(np.int32)
    return graph


def _graph_size(graph: Record, node_fields: Sequence[str]) -> tuple[int, int]:
    return len(graph[next(name for name in node_fields if name in graph)]), len(graph["senders"])


def _read_npy(path: Path) -> Record:
    return {"points": np.load(path, allow_pickle=False)}


def _read_npz(path: Path) -> Record:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _read_off(path: Path) -> Record:
    """Reads the vertices of an Object File Format mesh; some files have the counts on the first line."""
    tokens = path.read_bytes().split()
    if not tokens or not tokens[0].startswith(b"OFF"):
        raise ValueError(f"{path} must begin with OFF, got {tokens[:1]}; convert it")
    if tokens[0] == b"OFF":
        tokens = tokens[1:]
    else:
        tokens[0] = tokens[0][3:]
    count = int(tokens[0])
    return {"points": np.array(tokens[3 : 3 + 3 * count], np.float64).reshape(count, 3)}


_PLY_TYPES = {
    "char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1", "short": "i2", "int16": "i2", "ushort": "u2",
    "uint16": "u2", "int": "i4", "int32": "i4", "uint": "u4", "uint32": "u4", "float": "f4", "float32": "f4",
    "double": "f8", "float64": "f8",
}  # fmt: skip


def _read_ply(path: Path) -> Record:
    """Reads the vertices of a Polygon File Format file: x, y, z, and normals and colours where it has them."""
    content = path.read_bytes()
    header, found, body = content.partition(b"end_header\n")
    if not found:
        header, found, body = content.partition(b"end_header\r\n")
    lines = [line.split() for line in header.decode("ascii", "replace").splitlines() if line.split()]
    if not found or not lines or lines[0] != ["ply"]:
        raise ValueError(f"{path} must be a PLY file with a complete header; convert it")
    elements = [(number, line) for number, line in enumerate(lines) if line[0] == "element"]
    if not elements or elements[0][1][1] != "vertex":
        raise ValueError(f"{path} must list its vertices first; convert it")
    first, (_, _, count) = elements[0]
    last = elements[1][0] if len(elements) > 1 else len(lines)
    properties = [line for line in lines[first + 1 : last] if line[0] == "property"]
    if any(line[1] == "list" for line in properties):
        raise ValueError(f"{path} must have plain numbers as properties of its vertices, got a list; convert it")
    kind = next(line[1] for line in lines if line[0] == "format")
    order = {"ascii": "=", "binary_little_endian": "<", "binary_big_endian": ">"}[kind]
    dtype = np.dtype([(line[2], order + _PLY_TYPES[line[1]]) for line in properties])
    if kind == "ascii":
        values = np.array(body.split()[: int(count) * len(properties)], np.float64).reshape(int(count), len(properties))
        columns = {name: values[:, number] for number, name in enumerate(dtype.names or ())}
    else:
        records = np.frombuffer(body, dtype, int(count))
        columns = {name: records[name] for name in dtype.names or ()}
    groups = {"points": ("x", "y", "z"), "normals": ("nx", "ny", "nz"), "colors": ("red", "green", "blue")}
    return {
        name: np.stack([columns[part] for part in parts], axis=1)
        for name, parts in groups.items()
        if set(parts) <= set(columns)
    }
