"""A spec is strict, and a mistake is answered with file, line, key, the bad value and what is legal."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from kilocopy.problem import ProblemError
from kilocopy.spec import Cluster, Quoted, Spec, load

SPECS = Path(__file__).parent.parent / "loadtests" / "specs"
DEMO = (SPECS / "demo.yaml").read_text()


@pytest.mark.parametrize("path", sorted(SPECS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_spec_is_valid_and_survives_its_own_json(path: Path) -> None:
    spec = load(path)
    assert Spec.model_validate_json(spec.model_dump_json()) == spec


MISTAKES = [
    ("replicas: 2", "replicas: 0", "cluster.replicas", "greater than or equal to 1", "0"),
    ("replicas: 2", "replicas: two", "cluster.replicas", "valid integer", "'two'"),
    ("  port: 8000", "  prot: 8000", "cluster.prot", "unknown key; legal here: address, replicas", "port, engine"),
    ("value: 0.09", "value: -1", "prices.hardware.usd_per_device_hour.value", "greater than or equal to 0", "-1"),
    ("kind: rented", "kind: stolen", "prices.hardware", "'owned', 'rented'", "stolen"),
    ("copies: 8,", "copies: -8,", "stages[1].copies", "greater than or equal to 1", "-8"),
    ("duration_s: 20, ", "", "stages[0]", "exactly one of duration_s and requests", ""),
    ("name: demo", "name: ../../etc", "name", "match pattern", "../../etc"),
    ("low: 0.05", "low: 0.5", "prices.hardware.usd_per_device_hour", "low <= value <= high", ""),
]


@pytest.mark.parametrize(("old", "new", "key", "legal", "value"), MISTAKES, ids=[m[1] or "no duration" for m in MISTAKES])
def test_a_mistake_names_file_line_key_value_and_what_is_legal(
    tmp_path: Path, old: str, new: str, key: str, legal: str, value: str
) -> None:
    assert old in DEMO
    path = tmp_path / "bad.yaml"
    path.write_text(DEMO.replace(old, new, 1))
    with pytest.raises(ProblemError) as caught:
        load(path)
    said = str(caught.value)
    where, line, rest = said.split(":", 2)
    assert where == str(path)
    assert key in rest
    assert legal in rest
    assert value in rest
    if new and not key.endswith("hour"):  # the line named is the line of the mistake (a whole part's mistake names its first line)
        assert new.strip().split(":")[0] in path.read_text().splitlines()[int(line) - 1] or key == "prices.hardware"


def test_a_missing_price_is_an_error_because_prices_have_no_default(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(DEMO[: DEMO.index("prices:")])
    with pytest.raises(ProblemError, match="prices: missing"):
        load(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1", "not valid YAML"),
        ("- 1", "a spec is a mapping"),
        ("", "a spec is a mapping"),
        ("a: 1\na: 2", "not valid YAML"),
        ("a: 2026-13-45", "not valid YAML"),
        (f"{DEMO}\n? {{a: 1}}\n: 2\n", "not valid YAML: .*unhashable key"),
        (f"a: {'[' * 20_000}", "lie too deep in each other"),
        (f"a: &x {{k: 1}}\n<<: [*x]\n1: 2\n{DEMO}", r":3: \[1\]: Keys should be strings"),  # a key that was merged in has no line of its own
    ],
)
def test_what_is_no_spec_at_all_gets_a_sentence(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ProblemError, match=said):
        load(path)


def test_a_missing_file_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(ProblemError, match="kilocopy init"):
        load(tmp_path / "none.yaml")


def test_the_hash_depends_on_meaning_not_on_layout(tmp_path: Path) -> None:
    path = tmp_path / "same.yaml"
    path.write_text("# a comment\n" + DEMO.replace("replicas: 2", "replicas:   2"))
    assert load(path).sha256 == load(SPECS / "demo.yaml").sha256
    path.write_text(DEMO.replace("replicas: 2", "replicas: 3"))
    assert load(path).sha256 != load(SPECS / "demo.yaml").sha256


def test_frozen() -> None:
    with pytest.raises(ValidationError):
        load(SPECS / "demo.yaml").name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("gpus", "tensor", "good"), [(0.25, 1, True), (0.25, 2, False), (1, 1, True), (2, 1, False), (8, 8, True), (1.5, 1, False)]
)
def test_gpus_per_replica_fit_the_parallel_workers(gpus: float, tensor: int, good: bool) -> None:
    tree = {"replicas": 2, "hardware": {"kind": "gpu", "gpus_per_replica": gpus}, "tensor_parallel": tensor}
    if good:
        assert Cluster.model_validate(tree).devices == 2 * gpus
    else:
        with pytest.raises(ValidationError, match=r"gpus_per_replica|fraction"):
            Cluster.model_validate(tree)


@given(st.floats(0, 10), st.floats(0, 10), st.floats(0, 10))
def test_a_band_holds_its_value(low: float, value: float, high: float) -> None:
    tree = {"value": value, "low": low, "high": high, "source": "test", "date": "2026-01-01"}
    if low <= value <= high:
        Quoted.model_validate(tree)
    else:
        with pytest.raises(ValidationError):
            Quoted.model_validate(tree)
