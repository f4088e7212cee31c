"""Setting a device up by hand with several packages of one release."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_runtime import factory
from edge_runtime.config import EdgeConfig
from edge_runtime.errors import ConfigError, PackageError
from edge_runtime.features.spec import Spec
from edge_runtime.runtime import Runtime
from edge_runtime.update.shelf import Shelf

WritePackage = Callable[..., tuple[Path, str]]


@pytest.fixture
def config(tmp_path: Path) -> EdgeConfig:
    return EdgeConfig(
        device="EWR",
        families=["toy"],
        state_dir=tmp_path / "state",
        socket=tmp_path / "edge.sock",
    )


@pytest.fixture
def named(write_package: WritePackage, tmp_path: Path) -> Callable[..., Path]:
    """`named("int8", ...)` is a package made with `...` in a file of this name."""
    return lambda name, **facts: shutil.copy(write_package(**facts)[0], tmp_path / f"{name}.onnx")


@pytest.mark.parametrize(("slower", "expected"), [("int8", "float32"), ("float32", "int8")])
def test_the_device_chooses_the_fastest_of_what_was_installed(
    config: EdgeConfig, named: Callable[..., Path], slower: str, expected: str
) -> None:
    int8, plain = (
        named(name, ballast=700 if name == slower else 0) for name in ("int8", "float32")
    )
    release = factory.install(config, int8, factory.inspect(int8, plain), [plain])
    for _start in range(2):
        with Runtime.open(config) as runtime:
            (arm,) = runtime.report({}).arms
        assert (arm.release, arm.variant) == (release, expected)


def test_one_package_is_installed_without_a_choice(
    config: EdgeConfig, named: Callable[..., Path]
) -> None:
    package = named("int8")
    factory.install(config, package, factory.inspect(package))
    plan = Shelf(config.state_dir / "shelf").load_current("toy")
    assert plan is not None
    assert plan.stable.variants == ()


def test_packages_of_other_features_are_no_variants(
    named: Callable[..., Path], toy_spec: Spec
) -> None:
    package = named("int8")
    narrow = named("narrow", spec=toy_spec.subset(["distance", "seen_1h"]))
    with pytest.raises(PackageError, match="narrow") as caught:
        factory.inspect(package, narrow)
    assert caught.value.code == "bad_variants"


def test_a_variant_that_is_wrong_here_is_not_installed(named: Callable[..., Path]) -> None:
    package, wrong = named("int8"), named("float32", model_bias=1.5)
    with pytest.raises(PackageError, match="golden_mismatch"):
        factory.inspect(package, wrong)


def test_variants_need_names_of_their_own(named: Callable[..., Path], tmp_path: Path) -> None:
    package = named("int8")
    (tmp_path / "other").mkdir()
    same = shutil.copy(package, tmp_path / "other")
    with pytest.raises(PackageError, match="bad_variants"):
        factory.inspect(package, Path(same))


def test_what_was_left_on_this_device_is_not_installed_again(
    config: EdgeConfig, named: Callable[..., Path]
) -> None:
    package = named("int8")
    info = factory.inspect(package)
    Shelf(config.state_dir / "shelf").quarantine(
        hashlib.sha256(package.read_bytes()).hexdigest(), "rolled_back"
    )
    with pytest.raises(ConfigError) as caught:
        factory.install(config, package, info)
    assert caught.value.code == "release_quarantined"
