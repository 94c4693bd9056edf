"""The figures by hand, what is charged on toys, and the command on a tiny model."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from safetensors.torch import load_file
from typer.testing import CliRunner

from mbrl_text_env.agents.learning import LoraImprover, serve
from mbrl_text_env.agents.model_free import evaluate, load_policy
from mbrl_text_env.agents.sampling import BestOfN, Sampling
from mbrl_text_env.benchmarks.statistics import mean_interval
from mbrl_text_env.benchmarks.studies import sample_efficiency
from mbrl_text_env.benchmarks.studies.harness import Exam, Spent, prompts_for
from mbrl_text_env.benchmarks.studies.sample_efficiency import (
    BEST_OF_N,
    METHODS,
    SAMPLING,
    UNITS,
    Bench,
    Point,
    Size,
    chosen,
    plot,
    rows_of,
)
from mbrl_text_env.language_models import TableLM, TransformersLM
from mbrl_text_env.mdp import initial
from mbrl_text_env.rewards import make
from mbrl_text_env.types import Budget, Ledger, Prompt, Usage
from tests.agents.learning.tiny import PROMPTS, tiny_lm
from tests.benchmarks.studies.tiny_command import TOKENS, Command, said
from tests.toys import CountReward, now

pytestmark = pytest.mark.filterwarnings("ignore:.*train prompts. with fewer than 500")

PLANNER = sample_efficiency.FULL.planner
SIZE = Size(
    test_prompts=3,
    samples=2,
    max_response_tokens=TOKENS,
    budgets=(16, 32),
    planner=PLANNER,
    choice_steps=32,
    choice_points=2,
    num_candidates=2,
    chunk_tokens=4,
    grpo_stages=2,
    grpo_steps=1,
    grpo_responses=8,
    iterations=2,
    loop_prompts=4,
    cheap_seeds=2,
)
TRAINED = ["ppo", "dqn", "grpo", "expert-iteration"]
AMOUNTS = ("reward_calls", "tokens", "flops", "seconds")


def point(*scores, method="ppo", amount="1 steps", seed=0, training=0.0, use=1.0):
    """A measurement; `training` and `use` are FLOPs, or all amounts."""
    training, use = (
        spent if isinstance(spent, Spent) else Spent(flops=spent) for spent in (training, use)
    )
    return Point(method, seed, amount, scores, training, use)


class TestSpent:
    USAGE = Usage(
        prompt_tokens=100, generated_tokens=5, reward_calls=3, lm_flops=7.0, reward_flops=11.0,
        value_flops=13.0, dynamics_flops=17.0, seconds=2.0,
    )  # fmt: skip

    def test_of_a_usage(self):
        """The models' FLOPs are 48; prompts are no tokens that were sampled."""
        usage = self.USAGE.as_dict()
        assert Spent.of(usage) == Spent(3.0, 5.0, 48.0, 2.0)
        assert Spent.of(usage, more_flops=2.0, seconds=9.0) == Spent(3.0, 5.0, 50.0, 9.0)
        assert Spent.of(usage, seconds=0.0).seconds == 0.0

    def test_amounts_add_up(self):
        first, second = Spent(1.0, 2.0, 3.0, 4.0), Spent(10.0, 20.0, 30.0, 40.0)
        assert first + second == Spent(11.0, 22.0, 33.0, 44.0)
        assert first * 0.5 == Spent(0.5, 1.0, 1.5, 2.0)
        assert Spent() + first == first


def test_a_point_is_read_as_it_was_written():
    written = point(
        0.5, 1.0, seed=3, training=Spent(1.0, 2.0, 3.0, 4.0), use=Spent(5.0, 6.0, 7.0, 8.0)
    )
    found = Point.from_json(json.loads(json.dumps(asdict(written))))
    assert found == written
    assert isinstance(found.scores, tuple)


class TestRows:
    def test_by_hand(self):
        """Prompt means 0.25, 0.75 and 1.25, seed means 0.5 and 1; three answers in the total."""
        points = [
            point(0.0, 0.5, 1.0, training=Spent(2, 4, 6, 8), use=Spent(1, 2, 3, 4)),
            point(0.5, 1.0, 1.5, seed=1, training=Spent(4, 8, 12, 16), use=Spent(3, 2, 1, 0)),
        ]
        interval = mean_interval(np.array([0.25, 0.75, 1.25]))
        assert 0.25 <= interval.low < 0.75 < interval.high <= 1.25
        assert rows_of(points) == [
            {
                "method": "ppo", "amount": "1 steps", "seeds": 2, "prompts": 3,
                "mean": 0.75, "low": interval.low, "high": interval.high,
                "seed_low": 0.5, "seed_high": 1.0,
                "training": asdict(Spent(3, 6, 9, 12)),
                "use": asdict(Spent(2, 2, 2, 2)),
                "total": asdict(Spent(9, 12, 15, 18)),
                "pays_after": None,
            }
        ]  # fmt: skip

    def test_the_interval_is_over_prompts(self):
        """Seeds that differ by one make none where the prompts' means are equal."""
        [row] = rows_of([point(0.0, 0.0), point(1.0, 1.0, seed=1)])
        assert (row["low"], row["high"]) == (0.5, 0.5)
        assert (row["seed_low"], row["seed_high"]) == (0.0, 1.0)
        [row] = rows_of([point(0.0, 1.0), point(0.0, 1.0, seed=1)])
        assert row["low"] < row["seed_low"] == 0.5 == row["seed_high"] < row["high"]

    def test_a_row_is_a_method_and_an_amount(self):
        points = [
            point(float(10 * seed + i), method=method, amount=amount, seed=seed)
            for seed in (0, 1)
            for i, (method, amount) in enumerate([("ppo", "1"), ("dqn", "1"), ("ppo", "2")])
        ]
        rows = rows_of(points)
        assert [(row["method"], row["amount"], row["seeds"], row["mean"]) for row in rows] == [
            ("ppo", "1", 2, 5.0),
            ("dqn", "1", 2, 6.0),
            ("ppo", "2", 2, 7.0),
        ]


class TestPaysAfter:
    # Reward by the FLOPs of an answer.
    LINE = ((100.0, 0.25), (10_000.0, 0.75))

    def pays(self, mean, use, training, line=LINE):
        baseline = [
            point(score, method=BEST_OF_N, amount=str(flops), use=flops) for flops, score in line
        ]
        *rest, row = rows_of([*baseline, point(mean, training=training, use=use)])
        assert [other["pays_after"] for other in rest] == [None] * len(line)
        return row["pays_after"]

    @pytest.mark.parametrize(
        ("mean", "equal"), [(0.5, 1000.0), (0.375, 10**2.5), (0.25, 100.0), (0.75, 10_000.0)]
    )
    def test_between_two_points(self, mean, equal):
        """Half of what the same reward takes best-of-N is saved with each answer."""
        assert self.pays(mean, equal / 2, 50 * equal) == pytest.approx(100.0)

    def test_the_order_of_points_does_not_matter(self):
        assert self.pays(0.5, 500.0, 50_000.0, self.LINE[::-1]) == pytest.approx(100.0)

    def test_means_are_over_seeds(self):
        points = [
            point(score + change, method=BEST_OF_N, amount=str(flops), use=flops, seed=seed)
            for flops, score in self.LINE
            for seed, change in enumerate((-0.25, 0.25))
        ]
        row = rows_of([*points, point(0.5, use=500.0, training=50_000.0)])[-1]
        assert row["pays_after"] == pytest.approx(100.0)

    @pytest.mark.parametrize(
        ("mean", "equal"), [(0.5, 1000.0), (0.625, 10**4.5), (0.375, 10**2.5), (0.75, 100_000.0)]
    )
    def test_a_mean_that_falls_is_no_more_than_the_one_before(self, mean, equal):
        """What is reached at 1,000 is not bought at 10,000; what is beyond is bought after it."""
        line = [(100.0, 0.25), (1000.0, 0.5), (10_000.0, 0.375), (100_000.0, 0.75)]
        assert self.pays(mean, equal / 2, 50 * equal, line) == pytest.approx(100.0)

    def test_the_highest_score_there_is(self):
        """Best-of-N had it at the first of two budgets."""
        line = [(100.0, 0.5), (1000.0, 1.0), (10_000.0, 1.0)]
        assert self.pays(1.0, 500.0, 5000.0, line) == pytest.approx(10.0)
        assert self.pays(1.0, 2000.0, 5000.0, line) is None

    @pytest.mark.parametrize(
        "changes",
        [
            {"training": 0.0},
            {"mean": 0.8},
            {"mean": 0.2},
            {"use": 1001.0},
            {"line": LINE[:1], "mean": 0.25, "use": 50.0},
            {"line": ()},
        ],
        ids=["untrained", "above", "below", "dearer", "one point", "no points"],
    )
    def test_none(self, changes):
        case = {"mean": 0.5, "use": 500.0, "training": 50_000.0}
        assert self.pays(**case) is not None
        assert self.pays(**{**case, **changes}) is None


class TestFigure:
    def test_what_is_drawn(self, tmp_path, monkeypatch):
        """Seeds 0.5 and 1.0 at a total of 7 + 3 FLOPs, both 1.0 at 97 + 3; sampling is free."""
        drawn = []
        save = Figure.savefig

        def watched(figure, *args, **options):
            drawn.append(figure)
            save(figure, *args, **options)

        monkeypatch.setattr(Figure, "savefig", watched)
        points = [
            point(score, method="ppo", amount=amount, seed=seed, training=flops, use=3.0)
            for amount, flops, scores in (("2", 97.0, (1.0, 1.0)), ("1", 7.0, (0.5, 1.0)))
            for seed, score in enumerate(scores)
        ]
        free = point(0.25, method=SAMPLING, use=Spent(0.0, 4.0, 0.0, 2.0))
        plot(rows_of([free, *points]), "kindness", tmp_path / "there.png")
        [figure] = drawn
        panels = dict(zip(UNITS, figure.axes, strict=True))
        assert list(panels) == list(AMOUNTS)
        sampling, ppo = panels["flops"].lines
        assert sampling.get_xdata().tolist() == []
        assert ppo.get_xdata().tolist() == [10.0, 100.0]
        assert ppo.get_ydata().tolist() == [0.75, 1.0]
        [band] = panels["flops"].collections
        edges = {tuple(corner) for corner in band.get_paths()[0].vertices.tolist()}
        assert edges == {(10.0, 0.5), (10.0, 1.0), (100.0, 1.0)}
        assert panels["tokens"].lines[0].get_xdata().tolist() == [4.0]
        assert panels["seconds"].lines[0].get_xdata().tolist() == [2.0]
        assert len(panels["seconds"].lines[1].get_xdata()) == 0
        assert panels["flops"].get_ylabel() == "mean kindness"
        assert "training and 1 answers" in panels["flops"].get_xlabel()
        assert imread(tmp_path / "there.png").shape[:2] == (1125, 1650)


def exam(reward, test, samples=2, max_response_tokens=TOKENS):
    return Exam(reward, test, samples, max_response_tokens)


def timeless(spent):
    return replace(spent, seconds=0.0)


class Clock:
    """Tells these times, one after the other."""

    def __init__(self, *times):
        self.perf_counter = iter(times).__next__


class TestWhatIsCharged:
    # It writes "aba" and stops, whatever it is asked; a prompt has a token a letter.
    SURE = TableLM(
        "ab",
        {
            "": [0.0, 1.0, 0.0], "a": [0.0, 0.0, 1.0], "ab": [0.0, 1.0, 0.0],
            "aba": [1.0, 0.0, 0.0],
        },
    )  # fmt: skip
    ASKED = (Prompt.from_text("a"), Prompt.from_text("babab"))

    def test_sampled_by_hand(self, monkeypatch):
        """Four tokens after one or five, at one operation each; scoring is not part of it."""
        monkeypatch.setattr("mbrl_text_env.benchmarks.studies.harness.time", Clock(10.0, 16.0))
        found = exam(CountReward(), self.ASKED).sampled(self.SURE, 0)
        assert found == (pytest.approx((2 / 3, 2 / 3)), Spent(0.0, 4.0, (5 + 9) / 2, 6 / 4))
        monkeypatch.setattr("mbrl_text_env.benchmarks.studies.harness.time", Clock(10.0, 16.0))
        found = exam(CountReward(), self.ASKED, 3, 2).sampled(self.SURE, 0)
        assert found == ((0.5, 0.5), Spent(0.0, 2.0, (3 + 7) / 2, 1.0))

    def test_sampled_scores_are_of_their_prompt(self):
        """Half of the responses are "a", the others "bb", and each has a stop token."""
        lm = TableLM("ab", {"": [0, 0.5, 0.5], "a": [1, 0, 0], "b": [0, 0, 1], "bb": [1, 0, 0]})
        test = [Prompt.from_text(text) for text in ("a", "b", "ab", "ba", "aab")]
        states = [initial(prompt, lm) for prompt in test]
        rows = [now(Sampling(lm).complete(state, 3, Ledger(), 7)) for state in states]
        texts = [[lm.decode(found.state.response_ids) for found in row] for row in rows]
        # Some prompts have both, and not all have the same.
        assert len({tuple(sorted(row)) for row in texts}) > 2
        scores, use = exam(CountReward(), test, 3).sampled(lm, 7)
        assert scores == pytest.approx([row.count("a") / 3 for row in texts])
        assert use.tokens == pytest.approx(np.mean([len(t) + 1 for row in texts for t in row]))

    def test_answered_by_hand(self, monkeypatch):
        """A budget of eleven pays for two responses of at most four tokens, scored once."""
        monkeypatch.setattr("mbrl_text_env.benchmarks.studies.harness.time", Clock(10.0, 16.0))
        reward = CountReward()
        agent = BestOfN(self.SURE, reward, max_response_tokens=4)
        scores, use = exam(reward, self.ASKED).answered(agent, Budget(tokens=11), 0)
        assert scores == pytest.approx((2 / 3, 2 / 3))
        assert use == Spent(1.0, 8.0, (1 + 8 + 5 + 8) / 2, 6 / 2)
        assert sum(map(len, reward.calls)) == 2

    def test_an_answer_pays_for_its_prompt(self):
        """Whatever was asked before, and however many answers to the prompt are drawn."""
        lm, [asked] = tiny_lm(), PROMPTS[:1]
        prefix = len(lm.encode_prompt(asked))
        for samples in (1, 3):
            state = initial(asked, lm)
            row = now(Sampling(lm, max_response_tokens=TOKENS).complete(state, 3, Ledger(), 0))
            lengths = [len(found.state.response_ids) for found in row[:samples]]
            made = exam(CountReward("e"), [asked], samples)
            _, use = made.sampled(lm, 0)
            alone = [lm.usage_bound(prefix, [length]).flops for length in lengths]
            assert use.flops == pytest.approx(np.mean(alone))
            assert use.tokens == pytest.approx(np.mean(lengths))
        # Sample 0 is the one that the budget pays for.
        agent = BestOfN(lm, CountReward("e"), n=1, max_response_tokens=TOKENS)
        for _ in range(2):
            _, use = made.answered(agent, Budget(tokens=TOKENS), 0)
            assert use.flops == pytest.approx(alone[0])

    def test_a_choice_pays_for_its_prompt(self, tmp_path):
        """The measurements in training find it in the cache, but an answer takes it whole."""
        lm, [asked] = tiny_lm(), PROMPTS[:1]
        asks = exam(CountReward("e"), [asked])
        points = chosen(Bench(lm, asks, PROMPTS[1:], (), SIZE, 0, tmp_path), "dqn", 0)
        [use] = {found.use for found in points}
        # Two candidates of four tokens to begin with, and two more if none ends.
        first = lm.usage_bound(len(lm.encode_prompt(asked)), [4, 4])
        assert use.flops > first.flops
        assert use.tokens <= 2 * TOKENS
        policy = load_policy(tmp_path / "dqn-0", lm, CountReward("e"))
        lm.clear_cache()
        ledger = Ledger()
        evaluate(policy, lm, CountReward("e"), [asked], ledger=ledger)
        assert timeless(use) == timeless(Spent.of(ledger.usage.as_dict()))


class Study(Command):
    """The command at the tiniest size."""

    def run(self, out, *, stop_after=None, **changes):
        """Run in a folder; Ctrl-C comes with the first score once a file of it is there."""
        if stop_after is not None:
            (self.folder / "stop").write_text(str(out / stop_after))
        options = {
            "--reward": f"{self.reward}:letters",
            "--language-model": str(self.model),
            "--dtype": "float32",
            "--out": str(out),
            "--json": str(out.with_suffix(".json")),
            **{f"--{name.replace('_', '-')}": str(value) for name, value in changes.items()},
        }
        words = [word for pair in options.items() for word in pair]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sample_efficiency, "QUICK", SIZE)
            return CliRunner(env={"COLUMNS": "200"}).invoke(self.app, ["--quick", *words])


def figures_of(out):
    return json.loads(out.with_suffix(".json").read_text())


def points_of(out, *methods):
    """Those of the files, by method."""
    names = [f"{method}-{seed}.json" for method in methods for seed in (0, 1)]
    rows = [json.loads((out / n).read_text()) for n in names if (out / n).is_file()]
    return [Point.from_json(row) for found in rows for row in found]


def made(out):
    return {path: path.stat().st_mtime_ns for path in out.rglob("*")}


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    return Study(sample_efficiency.main, tmp_path_factory.mktemp("models"), {})


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
    out = tmp_path_factory.mktemp("efficiency") / "run"
    found = command.run(out)
    assert found.exit_code == 0, found.output
    return out, figures_of(out), found


class TestCommand:
    def test_the_figures_are_those_of_the_files(self, finished):
        out, figures, found = finished
        points = points_of(out, *METHODS)
        assert [Point.from_json(row) for row in figures["points"]] == points
        assert figures["results"] == rows_of(points)
        assert [(r["method"], r["amount"], r["seeds"]) for r in figures["results"]] == [
            (SAMPLING, "one response", 2),
            (BEST_OF_N, "16 tokens", 2),
            (BEST_OF_N, "32 tokens", 2),
            (PLANNER, "16 tokens", 2),
            (PLANNER, "32 tokens", 2),
            ("ppo", "16 steps", 2),
            ("ppo", "32 steps", 2),
            ("dqn", "16 steps", 2),
            ("dqn", "32 steps", 2),
            ("grpo", "1 steps", 1),
            ("grpo", "2 steps", 1),
            ("expert-iteration", "1 iterations", 1),
            ("expert-iteration", "2 iterations", 1),
        ]
        assert {len(point.scores) for point in points} == {3}
        assert Size(**{**figures["study"]["size"], "budgets": (16, 32)}) == SIZE
        assert imread(out.with_suffix(".png")).shape[:2] == (1125, 1650)
        assert all(row["method"] in found.stdout for row in figures["results"])

    def test_the_scores_are_those_of_the_policies(self, command, finished):
        """Each of the policies that are there answers as it was measured, and unlike the others."""
        out, _, _ = finished
        lm, reward = TransformersLM(command.model), make(f"{command.reward}:letters")
        test = exam(reward, prompts_for(reward, "test", 3))
        improver = LoraImprover()
        policies = [
            (SAMPLING, "one response", lm),
            *(("grpo", f"{i} steps", serve(lm, out / f"grpo-0-{i}")) for i in (1, 2)),
            *(
                (
                    "expert-iteration",
                    f"{i} iterations",
                    improver.serve(lm, out / "loop-0" / f"0{i}" / "policy"),
                )
                for i in (1, 2)
            ),
        ]
        kept = {(p.method, p.amount): p for p in points_of(out, *METHODS) if p.seed == 0}
        for method, amount, policy in policies:
            scores, use = test.sampled(policy, 0)
            assert kept[method, amount].scores == scores, (method, amount)
            assert timeless(kept[method, amount].use) == timeless(use), (method, amount)
        assert len({kept[method, amount].scores for method, amount, _ in policies}) == 5

    def test_training_contains_what_came_before(self, finished):
        out, figures, _ = finished
        for method in TRAINED:
            for seed in {row["seed"] for row in figures["points"] if row["method"] == method}:
                first, second = (p for p in points_of(out, method) if p.seed == seed)
                for name in AMOUNTS:
                    assert 0 < getattr(first.training, name) < getattr(second.training, name)
        assert {p.training for p in points_of(out, "search")} == {Spent()}

    @pytest.mark.parametrize("algorithm", ["ppo", "dqn"])
    def test_what_choices_took(self, finished, algorithm):
        out, _, _ = finished
        for seed in (0, 1):
            found = [p for p in points_of(out, algorithm) if p.seed == seed]
            folder = out / f"{algorithm}-{seed}"
            ledger = json.loads((folder / "ledger.json").read_text())
            curve = json.loads((folder / "curve.json").read_text())["validation"]
            assert [row["steps"] for row in curve] == [0, 16, 32]
            assert [list(p.scores) for p in found] == [row["scores"] for row in curve[1:]]
            whole = Spent(
                ledger["reward_calls"],
                ledger["generated_tokens"],
                ledger["total_flops"],
                ledger["wall_seconds"],
            )
            assert found[-1].training == whole
            for p, row in zip(found, curve[1:], strict=True):
                usage = Usage(**row["usage"])
                assert p.training.flops == pytest.approx(usage.flops + row["training_flops"])
                # Two candidates of four tokens at most, also for the states that come next.
                assert p.training.tokens <= (16 + row["steps"]) * 2 * 4

    def test_what_grpo_took(self, finished):
        """Eight responses a step, of one step each."""
        out, _, _ = finished
        first, second = points_of(out, "grpo")
        ledgers = [json.loads((out / f"grpo-0-{i}" / "ledger.json").read_text()) for i in (1, 2)]
        names = ("reward_calls", "generated_tokens", "total_flops", "seconds")
        begun, went_on = (Spent(*(float(ledger[name]) for name in names)) for ledger in ledgers)
        assert first.training == begun
        assert vars(second.training) == pytest.approx(vars(begun + went_on))
        assert (first.training.reward_calls, second.training.reward_calls) == (8, 16)

    def test_grpo_goes_on_from_its_adapter(self, finished):
        """Adam moves a weight by the learning rate at most; a new adapter's are other ones."""
        out, _, _ = finished
        first, second = (
            load_file(out / f"grpo-0-{i}" / "adapter_model.safetensors") for i in (1, 2)
        )
        names = [name for name in first if "lora_A" in name]
        assert min(float(first[name].abs().max()) for name in names) > 0.05
        moved = [float((first[name] - second[name]).abs().max()) for name in names]
        assert 0 < max(moved) < 0.003

    def test_what_expert_iteration_took(self, finished):
        """A policy takes the value that its answers were planned with, and no validation."""
        out, _, _ = finished
        ledgers = [
            json.loads((out / "loop-0" / f"0{i}" / "ledger.json").read_text()) for i in (0, 1, 2)
        ]

        def total(iteration, *stages):
            names = ("reward_calls", "generated_tokens", "flops", "wall_seconds")
            rows = [ledgers[iteration][stage] for stage in stages]
            return Spent(*(sum(row[name] for row in rows) for name in names))

        assert total(1, "validation").tokens > 0
        improved = ("collected", "selected", "policy")
        first = total(0, "value") + total(1, *improved)
        second = first + total(1, "value") + total(2, *improved)
        found = points_of(out, "expert-iteration")
        for p, expected in zip(found, (first, second), strict=True):
            assert vars(p.training) == pytest.approx(vars(expected))

    def test_what_answers_took(self, finished):
        out, _, _ = finished
        for p in points_of(out, "search"):
            if p.method == SAMPLING:
                assert (p.use.reward_calls, p.use.tokens <= TOKENS) == (0, True)
            else:
                budget = int(p.amount.removesuffix(" tokens"))
                assert p.use.reward_calls > 0
                assert budget - TOKENS < p.use.tokens <= budget

    def test_a_second_run_makes_nothing(self, command, finished):
        out, figures, first = finished
        before = made(out)
        again = command.run(out)
        assert (again.exit_code, again.stdout) == (0, first.stdout)
        assert made(out) == before
        after = figures_of(out)
        assert (after["results"], after["points"]) == (figures["results"], figures["points"])

    def test_a_method_named_twice_counts_once(self, command, finished):
        out, figures, _ = finished
        found = command.run(out, methods="dqn, dqn", json=out.with_name("twice.json"))
        assert found.exit_code == 0, found.output
        rows = json.loads(out.with_name("twice.json").read_text())["results"]
        same = [row for row in figures["results"] if row["method"] == "dqn"]
        # Without best-of-N nothing is said of it.
        assert rows == [{**row, "pays_after": None} for row in same]

    def test_one_method_at_a_time(self, command, finished, tmp_path):
        """In another order, and stopped between; all is as in one run but for the seconds."""
        whole, _, _ = finished
        out = tmp_path / "run"
        found = command.run(out, methods="dqn", stop_after="dqn-0.json")
        assert found.exit_code == 130, found.output
        assert "The same call goes on" in said(found)
        assert not (out / "dqn-1.json").exists()
        before = made(out / "dqn-0")
        assert len(before) == 4
        for methods in ("dqn", "search", "search,dqn"):
            found = command.run(out, methods=methods)
            assert found.exit_code == 0, found.output
        assert made(out / "dqn-0") == before

        def without_time(points):
            return [replace(p, training=timeless(p.training), use=timeless(p.use)) for p in points]

        figures = figures_of(out)
        points = [Point.from_json(row) for row in figures["points"]]
        assert without_time(points) == without_time(points_of(whole, "search", "dqn"))
        assert figures["results"] == rows_of(points)

    def test_the_folder_of_another_study(self, command, finished, tmp_path):
        out, _, _ = finished
        before = made(out)
        found = command.run(out, seed=1, json=tmp_path / "other.json")
        assert found.exit_code == 2
        assert "another study (seed: 0 there, 1 here)" in said(found)
        assert made(out) == before
        mine = tmp_path / "mine"
        mine.mkdir()
        (mine / "precious.txt").write_text("mine")
        found = command.run(mine)
        assert found.exit_code == 2
        assert "holds other files and no study" in said(found)
        assert sorted(tmp_path.rglob("*")) == [mine, mine / "precious.txt"]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"methods": "search,reinforce"}, "--methods: expected some of"),
            ({"methods": "search,reinforce"}, "got 'reinforce'"),
            ({"methods": ""}, "got ''"),
            ({"reward": "sentimant"}, "Did you mean 'sentiment'"),
            ({"reward": "unit-tests"}, "CompareError: Reward 'unit-tests' applies to none"),
            ({"dtype": "int4"}, "--dtype: expected one of"),
        ],
    )
    def test_bad_input_is_told_without_a_traceback(self, command, tmp_path, changes, message):
        """And takes no folder, which the call that was meant could not use."""
        found = command.run(tmp_path / "run", **changes)
        assert found.exit_code == 2, found.output
        assert message in said(found)
        assert "Traceback" not in found.output
        assert list(tmp_path.iterdir()) == []
