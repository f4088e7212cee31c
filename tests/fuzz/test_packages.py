"""Damaged and hostile ONNX files against the reader of packages: refused by name, never a crash.

That a signed package of other bytes does not reach the reader at all is for test_updates.py.
"""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
import pytest

from edge_runtime.errors import PackageError
from edge_runtime.inference.onnxfile import check_whole, metadata_in
from edge_runtime.inference.package import read_package
from edge_runtime.inference.prover import Prover

COUNT = pytest.mark.parametrize("count", [10_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
WritePackage = Callable[..., tuple[Path, str]]


def damaged(chance: random.Random, good: bytes, other: bytes) -> bytes:
    """A package with flipped bits, cut, spliced with another, or with a part doubled or moved."""
    at, to = sorted((chance.randrange(len(good)), chance.randrange(len(good))))
    match chance.randrange(6):
        case 0:
            return good[:at]
        case 1:
            return good[:at] + other[to:]
        case 2:
            return good[:to] + good[at:]
        case 3:
            return good[:at] + good[to:]
        case 4:
            return good[:at] + chance.randbytes(to - at) + good[to:]
    data = bytearray(good)
    for _ in range(chance.randint(1, 8)):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(data)


@COUNT
def test_the_reader_refuses_by_name_or_reads_what_is_sound(
    memory: Path, write_package: WritePackage, count: int
) -> None:
    good, other = (write_package(bias=bias)[0].read_bytes() for bias in (0.0, 0.5))
    path, codes = memory / "damaged.onnx", Counter[str]()
    for seed in range(count):
        path.write_bytes(damaged(random.Random(seed), good, other))
        try:
            info = read_package(metadata_in(path))
            check_whole(path)
        except PackageError as error:
            codes[error.code] += 1
        except BaseException as error:
            raise AssertionError(f"damaged({seed}): crash") from error
        else:
            codes["sound"] += 1
            assert info.family, f"damaged({seed})"
    assert codes["sound"] < count / 2, codes
    assert {"unreadable_package", "missing_metadata", "bad_metadata"} <= codes.keys()


def external(location: Callable[[Path], str]) -> Callable[[onnx.ModelProto, Path], None]:
    """The weights where `location` says, as they lie in the good package."""

    def spoil(model: onnx.ModelProto, good: Path) -> None:
        weights = next(each for each in model.graph.initializer if each.name == "w")
        at, size = good.read_bytes().index(weights.raw_data), len(weights.raw_data)
        weights.ClearField("raw_data")
        weights.data_location = onnx.TensorProto.EXTERNAL
        facts = {"location": location(good), "offset": str(at), "length": str(size)}
        for key, value in facts.items():
            weights.external_data.add(key=key, value=value)

    return spoil


def custom(domain: str, *, declared: bool) -> Callable[[onnx.ModelProto, Path], None]:
    def spoil(model: onnx.ModelProto, _good: Path) -> None:
        model.graph.node[0].domain = domain
        if declared:
            model.opset_import.add(domain=domain, version=1)

    return spoil


def unknown_operator(model: onnx.ModelProto, _good: Path) -> None:
    model.graph.node[0].op_type = "Exec"


HOSTILE = {
    "weights in its neighbour": (external(lambda good: good.name), "external_data"),
    "weights at an absolute path": (external(str), "external_data"),
    "weights above": (external(lambda good: f"../{good.parent.name}/{good.name}"), "external_data"),
    "weights in a descriptor": (external(lambda _: "/proc/self/fd/0"), "external_data"),
    "a custom operator": (custom("evil", declared=True), "unreadable_package"),
    "an undeclared domain": (custom("evil", declared=False), "unreadable_package"),
    "an operator of nobody": (unknown_operator, "unreadable_package"),
}


@pytest.fixture(scope="module")
def prover() -> Iterator[Prover]:
    with contextlib.closing(Prover()) as prover:
        yield prover


@pytest.mark.parametrize("name", HOSTILE)
def test_a_package_that_reaches_beyond_itself_is_refused(
    tmp_path: Path, write_package: WritePackage, prover: Prover, name: str
) -> None:
    spoil, code = HOSTILE[name]
    good, _ = write_package()
    model = onnx.load(good)
    spoil(model, good)
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(model.SerializeToString())
    prover.prove(good)
    with pytest.raises(PackageError, match=code):
        prover.prove(bad)
