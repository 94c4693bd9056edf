"""Search trees: nodes are states; edges are sampled chunks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from mbrl_text_env.language_models.base import Tokenizer
from mbrl_text_env.mdp import is_terminal
from mbrl_text_env.types import Chunk, TextState


@dataclass(eq=False)
class Node:
    """A state in a search tree."""

    index: int  # position in `SearchTree.nodes`
    state: TextState
    parent: Node | None = None  # None at the root
    chunk: Chunk | None = None  # the action that leads from the parent to here
    children: list[Node] = field(default_factory=list)  # a chunk sampled twice is one child
    samples: int = 0  # chunks sampled from here, including repetitions
    copies: int = 1  # number of times this node was sampled from its parent
    value: float | None = None  # the value model's mean, or None
    std: float = 0.0  # the value model's standard deviation
    details: Mapping[str, Any] = field(default_factory=dict)  # of the value estimate, by name
    score: float | None = None  # the reward of a complete response, or None
    parts: Mapping[str, float] = field(default_factory=dict)
    visits: int = 0  # visit count, in searches that use one
    total: float = 0.0  # sum of the returns backed up
    perturbed: float | None = None  # log-probability plus Gumbel noise, without replacement
    note: str = ""  # why the search continued from here, or did not

    @property
    def is_terminal(self) -> bool:
        """Whether the response has ended."""
        return is_terminal(self.state)

    @property
    def worth(self) -> float | None:
        """The score of a complete response, or else the estimated value, or None."""
        return self.score if self.score is not None else self.value

    @property
    def mean(self) -> float:
        """Mean return backed up through this node; NaN without visits."""
        return self.total / self.visits if self.visits else float("nan")

    @property
    def depth(self) -> int:
        """Number of chunks from the root."""
        return sum(1 for _ in self.path()) - 1

    def path(self) -> Iterator[Node]:
        """Yield this node and its ancestors, up to the root."""
        node: Node | None = self
        while node is not None:
            yield node
            node = node.parent

    def step(self) -> tuple[Node, Chunk]:
        """Return the parent and the chunk from it; a ValueError at the root."""
        if self.parent is None or self.chunk is None:
            raise ValueError("step: expected a node below the root, got the root.")
        return self.parent, self.chunk

    def logprobs(self) -> tuple[float, ...]:
        """Log-probability (nats) of each token from the root to this node."""
        chunks = [node.chunk for node in self.path() if node.chunk is not None]
        return tuple(value for chunk in reversed(chunks) for value in chunk.logprobs)


class SearchTree:
    """The states that a search has reached; `chosen` is the answer's node."""

    def __init__(self, state: TextState) -> None:
        self.nodes = [Node(0, state)]
        self.chosen: Node | None = None

    @property
    def root(self) -> Node:
        """The node at which the search started."""
        return self.nodes[0]

    def add(self, parent: Node, chunk: Chunk, state: TextState) -> Node:
        """Return the child for a sampled chunk, which is new or exists already."""
        parent.samples += 1
        for child in parent.children:
            if child.state == state:
                child.copies += 1
                return child
        child = Node(len(self.nodes), state, parent, chunk)
        self.nodes.append(child)
        parent.children.append(child)
        return child

    def complete(self) -> list[Node]:
        """Return the scored complete responses."""
        return [node for node in self.nodes if node.score is not None]

    def best(self) -> Node | None:
        """Return the complete response with the highest score; the first if tied."""
        return max(self.complete(), key=attrgetter("score"), default=None)

    def to_dict(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """Convert to JSON values: the prompt, and each node's text, value, visits and note."""
        on_path = set() if self.chosen is None else {node.index for node in self.chosen.path()}
        return {
            "prompt_id": self.root.state.prompt.id,
            "prompt": self.root.state.prompt.text,
            "prefix": tokenizer.decode(self.root.state.response_ids),
            "chosen": None if self.chosen is None else self.chosen.index,
            "nodes": [_node_dict(node, tokenizer, on_path) for node in self.nodes],
        }


def _node_dict(node: Node, tokenizer: Tokenizer, on_path: set[int]) -> dict[str, Any]:
    chunk = node.chunk
    return {
        "index": node.index,
        "parent": None if node.parent is None else node.parent.index,
        "depth": node.depth,
        "text": "" if chunk is None else tokenizer.decode(chunk.token_ids),
        "token_ids": [] if chunk is None else list(chunk.token_ids),
        "logprob": sum(chunk.logprobs) if chunk is not None and chunk.logprobs else None,
        "response_tokens": len(node.state.response_ids),
        "finish_reason": node.state.finish_reason,
        "copies": node.copies,
        "value": node.value,
        "std": node.std if node.value is not None else None,
        **({"details": dict(node.details)} if node.details else {}),
        "score": node.score,
        "parts": dict(node.parts),
        "visits": node.visits,
        "mean": node.mean if node.visits else None,
        "chosen": node.index in on_path,
        "note": node.note,
    }


def partial(nodes: Iterable[Node]) -> list[Node]:
    """Return the distinct non-terminal nodes, in order."""
    return [node for node in dict.fromkeys(nodes) if not node.is_terminal]
