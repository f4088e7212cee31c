"""Scoring: what models do wrong stays in their own places, with sessions or without."""

from __future__ import annotations

import numpy as np
import pytest

from edge_runtime.errors import PackageError
from edge_runtime.inference.runner import Runner
from edge_runtime.inference.scoring import score, score_many, score_table
from edge_runtime.inference.slot import Arm

FAILS, FITS = np.float32([99, 1]), np.float32([0, 1])


@pytest.fixture
def runner_of(tmp_path):
    """`runner_of(nodes, **weights)` loads a model of two features, of which `nodes` make
    "probability" and "embedding".
    """
    from onnx import TensorProto, helper, numpy_helper

    def runner_of(nodes, **weights):
        inputs = [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", 2])]
        outputs = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size])
            for name, size in (("probability", 1), ("embedding", 2))
        ]
        graph = helper.make_graph(
            [helper.make_node(kind, given, made, **how) for kind, given, made, how in nodes],
            "odd",
            inputs,
            outputs,
            [numpy_helper.from_array(each, name) for name, each in weights.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.onnx"
        path.write_bytes(model.SerializeToString())
        return Runner(path)

    return runner_of


@pytest.fixture
def picky(runner_of):
    """Answers where the first feature is below 8, else fails."""
    return runner_of(
        [
            ("Gather", ["features", "first"], ["at"], {"axis": 1}),
            ("Cast", ["at"], ["index"], {"to": 7}),
            ("GatherND", ["cells", "index"], ["probability"], {}),
            ("Identity", ["features"], ["embedding"], {}),
        ],
        first=np.array([0]),
        cells=np.full((8, 1), 0.5, np.float32),
    )


@pytest.fixture
def mixing(runner_of):
    """Answers by how a row differs from those beside it."""
    return runner_of(
        [
            ("ReduceMean", ["features"], ["mean"], {"axes": [0], "keepdims": 1}),
            ("Sub", ["features", "mean"], ["embedding"], {}),
            ("MatMul", ["embedding", "ones"], ["probability"], {}),
        ],
        ones=np.ones((2, 1), np.float32),
    )


def arms_of(*runners):
    return [Arm(f"arm{n}", f"r{n}", each, None, 1.0) for n, each in enumerate(runners)]


def test_an_arm_without_an_answer_has_no_embedding_either(picky, mixing):
    arms = arms_of(picky, mixing)
    score(arms, [FITS.tobytes()] * 2)

    answers, _, embedding = score(arms, [FAILS.tobytes()] * 2)
    together = score_many(arms, [[FAILS.tobytes()] * 2])

    assert isinstance(answers[0], PackageError)
    assert isinstance(answers[1], list)
    assert embedding is None
    assert together[0][2] is None


def test_a_model_that_mixes_rows_answers_each_candidate_by_itself(picky, mixing):
    table = np.float32([[0, 1], [0, 2], [0, 3]])

    scored = score_table(arms_of(picky, mixing), [table] * 2)
    alone = [score(arms_of(mixing), [row.tobytes()])[0][0] for row in table]

    assert [[float(each)] for each in scored.answers[1]] == alone


def test_an_embedding_of_another_shape_than_declared_is_no_answer(runner_of):
    odd = runner_of(
        [
            ("ReduceSum", ["features", "axes"], ["probability"], {}),
            ("Reshape", ["features", "shape"], ["embedding"], {}),
        ],
        axes=np.array([1]),
        shape=np.array([-1, 1]),
    )

    with pytest.raises(PackageError) as caught:
        odd.embed(FITS[None])

    assert caught.value.code == "run_failed"


def test_a_row_on_which_a_model_fails_costs_a_table_that_row_alone(picky, mixing):
    table = np.stack([FITS, FAILS, FITS])

    scored = score_table(arms_of(picky, picky), [table] * 2)

    for answers in scored.answers:
        np.testing.assert_array_equal(answers, np.float32([0.5, np.nan, 0.5]))
    np.testing.assert_array_equal(scored.embeddings, np.stack([FITS, [np.nan] * 2, FITS]))


@pytest.mark.parametrize("rows", [1, 3])
def test_a_model_that_fails_on_all_rows_of_a_table_has_one_error(picky, mixing, rows):
    scored = score_table(arms_of(picky, mixing), [np.stack([FAILS] * rows)] * 2)

    assert isinstance(scored.answers[0], PackageError)
    assert scored.embeddings is None
    assert len(scored.answers[1]) == rows
