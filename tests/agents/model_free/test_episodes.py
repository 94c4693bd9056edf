"""Episodes of choices, against the same choices made one by one."""

import numpy as np

from mbrl_text_env.agents.model_free import evaluate, play
from mbrl_text_env.mdp import initial, is_terminal
from mbrl_text_env.types import Ledger
from tests.agents.model_free.choice_worlds import LM, PROMPTS, reward
from tests.agents.model_free.test_candidate_policy import greedy


class TestPlay:
    def test_the_greedy_choice_by_hand(self):
        """Each step takes the candidate with most "a" so far."""
        found = greedy()
        proposer = found.view.proposer(LM, reward(), PROMPTS, None)
        states = [initial(prompt, LM) for prompt in PROMPTS]
        ledgers = [Ledger(), Ledger()]
        ended = play(proposer, found.choose, states, [7, 8], ledgers)
        for state, seed, end in zip(states, (7, 8), ended, strict=True):
            while not is_terminal(state):
                [row] = proposer.propose([state], [seed], [Ledger()])
                [children] = proposer.children([state], [row])
                state = max(children, key=lambda s: LM.decode(s.response_ids).count("a"))
            assert end == state
        for ledger in ledgers:
            assert ledger.usage.generated_tokens == 4 * 4 * 2

    def test_alone_equals_together(self):
        found = greedy()
        proposer = found.view.proposer(LM, reward(), PROMPTS, None)
        states = [initial(prompt, LM) for prompt in PROMPTS]
        together = play(proposer, found.choose, states, [1, 2], [Ledger(), Ledger()])
        alone = [
            play(proposer, found.choose, [state], [seed], [Ledger()])[0]
            for state, seed in zip(states, (1, 2), strict=True)
        ]
        assert together == alone

    def test_what_has_ended_stays(self):
        found = greedy()
        proposer = found.view.proposer(LM, reward(), PROMPTS, None)
        [end] = play(proposer, found.choose, [initial(PROMPTS[0], LM)], [1], [Ledger()])
        ledger = Ledger()
        assert play(proposer, found.choose, [end], [1], [ledger]) == [end]
        assert ledger.usage.generated_tokens == 0


class TestEvaluate:
    def test_scores_are_those_of_the_episodes(self):
        ledger = Ledger()
        found = evaluate(greedy(), LM, reward(), PROMPTS, episodes=3, seed=4, ledger=ledger)
        assert found.shape == (2, 3)
        assert ledger.usage.generated_tokens == 6 * 4 * 4 * 2
        again = evaluate(greedy(), LM, reward(), PROMPTS[1:], episodes=3, seed=4)
        assert again.tolist() == found[1:].tolist()
        assert len({tuple(row) for row in found.tolist()}) == 2

    def test_another_choice_takes_the_place_of_the_policy(self):
        first = evaluate(
            greedy(), LM, reward(), PROMPTS, episodes=50,
            choose=lambda rows: np.zeros(len(rows), dtype=np.int64),
        )  # fmt: skip
        best = evaluate(greedy(), LM, reward(), PROMPTS, episodes=50)
        assert best.mean() > first.mean() + 0.2
