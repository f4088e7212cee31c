"""How `tuf-client` walks delegations: in order, by path, no role twice, and what each may sign."""

from __future__ import annotations

from urllib.parse import quote

import pytest

# Each graph: delegator>role, with ":" and a path if not all are delegated, and "!" if it is a
# terminating one; then the walk for a path that nobody signs.
GRAPHS = {
    "one": ("targets>A", "A"),
    "two beside each other": ("targets>A targets>B", "AB"),
    "two levels": ("targets>A targets>B B>C", "ABC"),
    "depth first": ("targets>A targets>B A>C A>D", "ACDB"),
    "depth first at three levels": ("targets>A targets>B A>C C>D", "ACDB"),
    "ended by a terminating one": ("targets>A targets>B A>C! A>D", "AC"),
    "below a terminating one": ("targets>A targets>B A>C! C>D", "ACD"),
    "not into other paths": ("targets>A:*.py targets>B A>C", "B"),
    "not into other paths below": ("targets>A targets>B A>C:*.py C>D", "AB"),
    "a circle": ("targets>A targets>B B>C C>D D>B", "ABCD"),
    "a role of itself": ("targets>A A>A A>B", "AB"),
    "two ways to one role": ("targets>A targets>B B>C A>C", "ACB"),
    "two ways, one of them by other paths": ("targets>A targets>B B>C A>C:*.py", "ABC"),
}


def build(repository, graph: str) -> list[str]:
    """Delegate as `graph` says; the roles in it."""
    roles = []
    for edge in graph.split():
        delegator, _, rest = edge.partition(">")
        name, _, path = rest.partition(":")
        terminating = name.endswith("!")
        name = name.removesuffix("!")
        repository.delegate(delegator, name, [path or "*"], terminating=terminating)
        roles.append(name)
    return list(dict.fromkeys(roles))


def walked(repository) -> str:
    """The delegated roles that were asked for, in order."""
    names = [each.removeprefix("/metadata/").split(".", 1)[-1] for each in repository.asked]
    return "".join(name for name in names if len(name) == 1)


@pytest.mark.parametrize("case", GRAPHS)
def test_roles_are_visited_in_order_of_appearance(repository, device, case):
    graph, walk = GRAPHS[case]
    repository.publish_all(*build(repository, graph))
    assert device.download("missing") == 1
    assert "not_released" in device.said
    assert walked(repository) == walk


@pytest.mark.parametrize(
    ("path", "walk", "found"),
    [
        ("plain", "", True),
        ("read.md", "A", True),
        ("releases/x/x1", "BC", True),
        ("releases/y/y1.zip", "BD", True),
        ("releases/z/z1.zip", "B", False),
        ("releases/x", "", False),
        ("releases/x/y/z", "", False),
    ],
)
def test_a_role_may_sign_only_what_every_role_above_it_delegates(
    repository, device, path, walk, found
):
    repository.delegate("targets", "A", ["*.doc", "*.md"])
    repository.delegate("targets", "B", ["releases/*/*"])
    repository.delegate("B", "C", ["releases/x/*"])
    repository.delegate("B", "D", ["releases/y/*.zip"])
    signed = {"plain": "targets", "read.md": "A", "releases/x/x1": "C", "releases/x": "C"}
    signed |= {"releases/y/y1.zip": "D", "releases/z/z1.zip": "D", "releases/x/y/z": "C"}
    for name, role in signed.items():
        repository.add_target(name, name.encode(), role)
    repository.publish_all(*"DCBA")
    assert device.download(path) == (0 if found else 1)
    assert device.held() == ([path.encode()] if found else [])
    assert walked(repository) == walk


@pytest.mark.parametrize("signed_by_both", [False, True])
def test_the_second_way_to_a_role_asks_for_its_own_keys(repository, device, signed_by_both):
    repository.delegate("targets", "A", ["a/*"])
    repository.delegate("targets", "B", ["b/*"])
    repository.delegate("A", "C", ["a/*"])
    repository.delegate("B", "C", ["b/*"])
    repository.add_target("a/file", b"by way of A", "C")
    repository.add_target("b/file", b"by way of B", "C")
    if not signed_by_both:
        repository.signers["C"].pop()
    repository.publish_all(*"CBA")
    assert device.download("a/file", "b/file") == (0 if signed_by_both else 1)
    assert device.held() == [b"by way of A", b"by way of B"][: 2 if signed_by_both else 1]
    assert signed_by_both or "below_threshold" in device.said


AROUND = ["given.json", "metadata", "targets"]


@pytest.mark.parametrize(
    "name", ["?", "#", "/role", "../role", "../../role", ".", "..", "a b", "%2e"]
)
def test_a_role_of_an_odd_name_is_quoted_and_stays_in_the_cache(repository, device, name):
    repository.delegate("targets", name)
    repository.publish_all(name)
    assert device.download("missing") == 1
    assert f"/metadata/1.{quote(name, '')}" in repository.asked
    assert len(device.trusted()) == 5
    assert sorted(each.name for each in device.metadata.parent.iterdir()) == AROUND


def test_a_role_that_the_snapshot_does_not_list_is_refused(repository, device):
    repository.delegate("targets", "A")
    repository.publish_all()
    assert device.download("missing") == 1
    assert "bad_metadata" in device.said
    assert "A" not in device.trusted()


def test_more_roles_than_the_bound_are_not_walked(repository, device):
    roles = [chr(ord("A") + number) for number in range(12)]
    for name in roles:
        repository.delegate("targets", name)
    repository.add_target("file", b"content", roles[-1])
    repository.publish_all(*roles)
    assert device.download("file") == 1
    assert walked(repository) == "".join(roles[:8])
