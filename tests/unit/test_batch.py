"""The examples of a step: the stream's, with the hardest prompts in the place of some."""

from collections import Counter

import pytest

from afd_data.errors import UserError
from afd_train.batch import check_prompts, hardest, next_examples, replaced
from afd_train.margins import Margins
from afd_train.objective_config import AfdConfig, DistilConfig, FlowMatchingConfig, SftConfig


def margins_of(values: dict[str, float]) -> Margins:
    margins = Margins()
    margins.load_state_dict([[prompt, margin, 0, 1, 0] for prompt, margin in values.items()])
    return margins


def prompts(setup) -> list[str]:
    return sorted({place.prompt_id for place in setup.stream.places.values()})


def with_margins(setup):
    """The n-th of the prompts, by id, has margin n."""
    setup.margins = margins_of({prompt: float(number) for number, prompt in enumerate(prompts(setup))})
    return setup


def ids(examples) -> list[str]:
    return [example.prompt_id for example in examples]


def test_the_hardest_are_the_quarter_with_the_largest_margins():
    assert hardest(margins_of({"a": 1.0, "b": 4.0, "c": 2.0, "d": 3.0, "e": 0.0})) == ["b", "d"]  # of 5, rounded up
    assert hardest(margins_of({"b": 1.0, "a": 1.0})) == ["a"]  # equal ones by id
    assert hardest(Margins()) == []


@pytest.mark.parametrize(
    ("drawn", "count", "chosen"),
    [
        (["x", "y"], 2, ["a", "b", "x", "y"]),
        (["x", "y"], 1, ["a", "b", "c", "x"]),
        (["a", "x"], 2, ["a", "b", "x", "d"]),  # a is there already, and then nothing is left
        (["d", "c"], 2, ["a", "b", "c", "d"]),  # both are: each can only stay where it is
        ([], 2, ["a", "b", "c", "d"]),
    ],
)
def test_the_last_prompts_give_way_and_none_comes_twice(drawn, count, chosen):
    assert replaced(["a", "b", "c", "d"], drawn, count) == chosen


def test_a_share_of_0_is_the_streams_order(setup_of):
    setup, plain = with_margins(setup_of(AfdConfig(), prompts_per_step=4)), setup_of(AfdConfig())
    assert [e.key for e in next_examples(setup, 0)] == [e.key for e in plain.stream.next_batch(4)]


def test_as_many_as_asked_for_are_drawn_from_the_hardest_quarter(setup_of):
    setup = with_margins(setup_of(AfdConfig(), prompts_per_step=4, hardest=0.5))
    hard = set(prompts(setup)[-3:])  # of 12
    shown = Counter()
    for step in range(30):
        chosen = ids(next_examples(setup, step))
        assert len(set(chosen)) == 4
        assert sum(prompt in hard for prompt in chosen) >= 2
        shown.update(chosen)
    # At least half of 120 places fall to three prompts, evenly; to the stream's nine others about 60 / 12 each.
    assert all(20 <= shown[prompt] <= 50 for prompt in hard)


def test_the_stream_moves_on_as_if_nothing_was_replaced(setup_of):
    setup, plain = with_margins(setup_of(AfdConfig(), prompts_per_step=4, hardest=0.5)), setup_of(AfdConfig())
    for step in range(3):
        assert ids(next_examples(setup, step))[:2] == ids(plain.stream.next_batch(4))[:2]
    assert setup.stream.state_dict() == plain.stream.state_dict()


def test_the_choice_follows_from_seed_and_step(setup_of):
    def chosen(seed: int, steps: list[int]) -> list[list[str]]:
        setup = setup_of(AfdConfig(), seed=seed, prompts_per_step=4, hardest=0.25)
        coming = set(ids(setup_of(AfdConfig(), seed=seed).stream.next_batch(4)))
        setup.margins = margins_of({prompt: float(prompt not in coming) for prompt in prompts(setup)})
        return [ids(next_examples(setup, step)) for step in steps]

    assert chosen(0, [5, 6]) == chosen(0, [5, 6])
    # At the same place in the stream, one of three is drawn.
    assert len({tuple(chosen(0, [step])[0]) for step in range(8)}) > 1


def test_more_prompts_a_step_than_there_are_is_refused(setup_of):
    check_prompts(setup_of(AfdConfig(), prompts_per_step=12))
    with pytest.raises(UserError, match=r"train\.prompts_per_step: 13 distinct .* has 12 .*Set it to 12 or less"):
        check_prompts(setup_of(AfdConfig(), prompts_per_step=13))


def test_a_warm_up_of_more_prompts_than_there_are_is_refused_where_there_is_one(setup_of):
    setup = setup_of(AfdConfig())
    wide = setup.discriminator.model_copy(update={"warmup_prompts": 32})
    setup.discriminator = wide.model_copy(update={"warmup_steps": 0})
    check_prompts(setup)
    setup.discriminator = wide
    with pytest.raises(UserError, match=r"discriminator\.warmup_prompts: 32 distinct"):
        check_prompts(setup)


@pytest.mark.parametrize("objective", [FlowMatchingConfig(), SftConfig(), DistilConfig()], ids=lambda o: o.name)
def test_where_repeats_are_harmless_they_are_allowed(setup_of, objective):
    check_prompts(setup_of(objective, prompts_per_step=99))


def test_prompts_that_are_not_in_the_cache_any_more_are_not_drawn(setup_of):
    setup = setup_of(AfdConfig(), prompts_per_step=2, hardest=0.5)
    setup.margins = margins_of({"gone": 9.0})
    assert "gone" not in ids(next_examples(setup, 0))
