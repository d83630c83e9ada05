"""The span grammar against a slow state machine, and round trips."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unimm.codes import VisualCodes
from unimm.sequence import ImageSpan, SpanGrammar, SpanShape, SpelledSizes, TextSpan, VisualVocabulary, read_shapes

VOCABULARY = VisualVocabulary(
    image_token_offset=20, codebook_sizes=(7,), boi_token_id=1, eoi_token_id=2, image_token_id=3, pad_token_id=0
)
FIXED = SpanGrammar(VOCABULARY, (SpanShape((2, 2), (), 4, 4),))
SIZED = SpanGrammar(
    VOCABULARY,
    (SpanShape((1, 2), (5, 9), 2, 2), SpanShape((2, 2), (6, 9), 4, 4), SpanShape((1, 3), (5, 8), 3, 3)),
)
NESTED = SpanGrammar(VOCABULARY, (SpanShape(None, (), 1, 3),))
TWO_SLOTS = VisualVocabulary(
    image_token_offset=20, codebook_sizes=(4, 3), boi_token_id=1, eoi_token_id=2, image_token_id=3, pad_token_id=0
)
PAIRED = SpanGrammar(TWO_SLOTS, (SpanShape((1, 2), (5,), 2, 2), SpanShape((2, 2), (6,), 4, 4)))
PAIRED_NESTED = SpanGrammar(TWO_SLOTS, (SpanShape(None, (), 1, 3),))
SPELLED = SpanGrammar(
    VOCABULARY, SpelledSizes((1, 2), (9, 10), digits=tuple(range(4, 14)), between=(14,), end=(15, 16)).shapes()
)
GRAMMARS = {
    "fixed": FIXED,
    "sized": SIZED,
    "nested": NESTED,
    "paired": PAIRED,
    "paired nested": PAIRED_NESTED,
    "spelled": SPELLED,
}
TEXT = set(range(20)) - {2, 3}


def slow_allowed(grammar, ids):
    """What may follow, by reading one id after another."""
    inside, seen = False, []
    for token in ids:
        if token == 1:
            inside, seen = True, []
        elif token == 2:
            inside = False
        elif inside:
            seen.append(token)
    if not inside:
        return TEXT
    for shape in grammar.shapes:
        if tuple(seen[: len(shape.prefix)]) == shape.prefix:
            sizes = grammar.vocabulary.codebook_sizes
            count, slot = divmod(len(seen) - len(shape.prefix), len(sizes))
            first = 20 + sum(sizes[:slot])
            codes = set(range(first, first + sizes[slot]))
            if slot:
                return codes
            return (codes if count < shape.max_positions else set()) | ({2} if count >= shape.min_positions else set())
    return {shape.prefix[len(seen)] for shape in grammar.shapes if shape.prefix[: len(seen)] == tuple(seen)}


@st.composite
def legal_walks(draw, grammar):
    """A sequence of which every id is allowed by the slow machine."""
    ids = draw(st.lists(st.sampled_from(sorted(TEXT - {1})), max_size=3))
    for _ in range(draw(st.integers(0, 25))):
        choices = sorted(slow_allowed(grammar, ids))
        ids.append(draw(st.sampled_from([*choices, *([1] * (len(choices) // 4) if 1 in choices else [])])))
    return ids or [4]


@pytest.mark.parametrize("name", GRAMMARS)
def test_places_of_codes_are_counted_alike_from_both_sides(name):
    grammar = GRAMMARS[name]

    @given(legal_walks(grammar))
    @settings(max_examples=60, deadline=None)
    def check(ids):
        places = grammar.places(torch.tensor([ids]))[0].tolist()
        for step, token in enumerate(ids):
            is_code = token >= grammar.vocabulary.image_token_offset
            expected = grammar.place_after(ids[:step])
            assert places[step] == (expected if is_code else -1)

    check()


def test_codes_behind_a_full_picture_have_no_place():
    ids = torch.tensor([[4, 1, 20, 21, 22, 23, 24, 4, 2, 20]])
    assert FIXED.places(ids).tolist() == [[-1, -1, 0, 1, 2, 3, -1, -1, -1, -1]]


@pytest.mark.parametrize("name", GRAMMARS)
def test_masks_equal_the_slow_machine(name):
    grammar = GRAMMARS[name]

    @given(legal_walks(grammar), st.integers(0, 3))
    @settings(max_examples=60, deadline=None)
    def check(ids, padding):
        padded = torch.tensor([[0] * padding + ids])
        states = grammar.states(padded)[0, padding:]
        for position, state in enumerate(states):
            allowed = set(grammar.table[state].nonzero().flatten().tolist())
            assert allowed == slow_allowed(grammar, ids[: position + 1])
        assert bool(grammar.states(padded)[0, -1]) == (slow_allowed(grammar, ids) != TEXT)

    check()


@pytest.mark.parametrize("name", GRAMMARS)
def test_states_ahead_hold_whatever_follows(name):
    grammar = GRAMMARS[name]

    @given(legal_walks(grammar))
    @settings(max_examples=60, deadline=None)
    def check(ids):
        states = grammar.states(torch.tensor([ids]))[0].tolist()
        for position in range(len(ids)):
            ahead = grammar.ahead(ids[: position + 1])
            assert ahead[: len(ids) - position] == states[position : position + len(ahead)]

    check()
    assert FIXED.ahead([4, 1]) == [*[FIXED.states(torch.tensor([[1]])).item()] * 4, FIXED.num_states - 1]


SHARES = ((0.0, 1.0), (0.0, 0.5), (0.3, 0.8), (0.5, 1.0))


@pytest.mark.parametrize("name", GRAMMARS)
def test_a_share_of_a_picture_is_the_same_in_rows_and_ahead(name):
    grammar = GRAMMARS[name]

    @given(legal_walks(grammar), st.sampled_from(SHARES))
    @settings(max_examples=60, deadline=None)
    def check(ids, share):
        inside = grammar.within(torch.tensor([ids]), share)[0].tolist()
        for position in range(len(ids)):
            steps = grammar.steps_within(ids[: position + 1], share)
            known = len(grammar.ahead(ids[: position + 1]))
            told = [step in steps for step in range(known)]
            assert told[: len(ids) - position] == inside[position : position + known]

    check()


def test_shares_are_rounded_to_whole_codes():
    ids = torch.tensor([[4, 1, 20, 21, 22, 23, 2, 4]])  # a picture of four codes
    inside = {share: FIXED.within(ids, share)[0].nonzero().flatten().tolist() for share in SHARES}
    assert inside == {(0.0, 1.0): [1, 2, 3, 4], (0.0, 0.5): [1, 2], (0.3, 0.8): [2, 3], (0.5, 1.0): [3, 4]}
    ids = torch.tensor([[1, 6, 9, 20, 21, 22, 23, 2]])  # whose size is spelled
    assert SIZED.within(ids, (0.0, 0.5))[0].tolist() == [True] * 4 + [False] * 4
    assert SIZED.within(ids, (0.5, 1.0))[0].nonzero().flatten().tolist() == [4, 5]
    ids = torch.tensor([[1, 5, 20, 24, 21, 25, 2]])  # two codes at each of two positions
    assert PAIRED.within(ids, (0.25, 1.0))[0].nonzero().flatten().tolist() == [2, 3, 4]


@given(st.sampled_from([(1, 2), (2, 2), (1, 3)]), st.data())
@settings(max_examples=40, deadline=None)
def test_build_and_parse_round_trip(grid, data):
    rows, columns = grid
    ids = data.draw(st.lists(st.integers(0, 6), min_size=rows * columns, max_size=rows * columns))
    codes = VisualCodes.from_grid(torch.tensor(ids).view(1, rows, columns, 1))
    spans = SIZED.parse([4, *SIZED.build(codes), 7, 7])
    assert spans == [TextSpan((4,)), ImageSpan(tuple((code,) for code in ids), grid, True), TextSpan((7, 7))]


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_positions_of_two_slots_round_trip(data):
    pairs = data.draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=4, max_size=4))
    ids = PAIRED.build(VisualCodes.from_grid(torch.tensor(pairs).view(1, 2, 2, 2)))
    assert ids == [1, 6, *(row for form, palette in pairs for row in (20 + form, 24 + palette)), 2]
    assert PAIRED.parse(ids) == [ImageSpan(tuple(pairs), (2, 2), True)]
    assert len(ids) == PAIRED.longest


def test_half_a_position_is_no_position():
    assert PAIRED_NESTED.parse([1, 20, 24, 21, 2]) == [ImageSpan(((0, 0),), None, False)]


def test_a_cut_picture_is_incomplete():
    assert FIXED.parse([1, 20, 21]) == [ImageSpan(((0,), (1,)), None, False)]


def test_placeholders_count_as_codes():
    assert FIXED.states(torch.tensor([[1, 3, 3, 3, 3]]))[0, -1] == FIXED.num_states - 1
    assert FIXED.parse([1, 3, 3, 3, 3, 2]) == [ImageSpan(((None,),) * 4, (2, 2), True)]


def test_rows_of_a_batch_do_not_meet():
    rows = torch.tensor([[4, 4, 1, 20], [1, 20, 21, 22], [0, 0, 4, 5]])
    together = FIXED.states(rows)
    assert together.equal(torch.cat([FIXED.states(row[None]) for row in rows]))


def test_illegal_pictures_and_vocabularies_are_refused():
    with pytest.raises(ValueError, match="not legal here"):
        FIXED.build(VisualCodes.from_grid(torch.zeros(1, 3, 2, 1, dtype=torch.int64)))
    with pytest.raises(ValueError, match="none may begin another"):
        SpanGrammar(VOCABULARY, (SpanShape((1, 1), (5,), 1, 1), SpanShape((2, 2), (5, 6), 4, 4)))
    with pytest.raises(ValueError, match="different text rows"):
        VisualVocabulary(20, (7,), 1, 1, 3, 0)


@given(st.lists(st.integers(0, 6), max_size=9))
def test_vocabulary_round_trips(codes):
    tensor = torch.tensor(codes, dtype=torch.int64)[:, None]
    assert VOCABULARY.to_codes(VOCABULARY.to_token_ids(tensor)).equal(tensor)


def test_vocabulary_refuses_what_is_no_code():
    with pytest.raises(ValueError, match="0 to 6"):
        VOCABULARY.to_token_ids(torch.tensor([7]))
    with pytest.raises(ValueError, match="must be the 2 slots"):
        TWO_SLOTS.to_token_ids(torch.zeros(4, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="no picture codes"):
        VOCABULARY.to_codes(torch.tensor([19]))


def test_thousands_of_sizes_are_few_states():
    digits, end = tuple(range(4, 14)), (15,)
    sizes = SpelledSizes((24, 72), (24, 72), digits=digits, between=(14,), end=end)
    grammar = SpanGrammar(VOCABULARY, sizes.shapes())
    assert len(grammar.shapes) == 49 * 49
    assert grammar.num_states < 20
    shape = grammar.shape_of((30, 72))
    assert shape.prefix == (7, 4, 14, 11, 6, 15)
    assert grammar.shape_after([*shape.prefix, 20]) == shape
    assert grammar.shape_after([7, 4, 14, 11, 9]) is None  # 75 columns
    opened = torch.tensor([[1, 7, 4, 14, 11]])
    assert set(grammar.allowed(opened)[0].nonzero().flatten().tolist()) == {4, 5, 6}  # 70 to 72


def test_bounds_are_two_numbers_and_digits_are_ten():
    spelled = {"rows": [1, 2], "columns": [1, 2], "digits": list(range(4, 14)), "between": [14], "end": [15]}
    assert len(read_shapes([], spelled)) == 4
    for wrong in ({"rows": [2, 1]}, {"columns": [0, 1]}, {"digits": [4, 5]}):
        with pytest.raises(ValueError, match="spelled_sizes"):
            read_shapes([], spelled | wrong)


def test_two_pictures_of_one_spelling_are_refused():
    with pytest.raises(ValueError, match="spells two pictures"):
        SpanGrammar(VOCABULARY, (SpanShape((1, 2), (5,), 2, 2), SpanShape((2, 1), (5,), 2, 2)))


def test_a_grammar_of_one_length_keeps_the_pictures_that_can_have_it():
    assert SIZED.of_length(4).shapes == (SpanShape((2, 2), (6, 9), 4, 4),)
    assert PAIRED_NESTED.of_length(2).shapes == (SpanShape(None, (), 2, 2),)
    assert len(PAIRED_NESTED.of_length(2).ahead([1])) == 5  # two positions of two codes, and the end
    for grammar, number, shown in ((SIZED, 5, "2, 3, 4"), (NESTED, 4, "1 to 3"), (FIXED, 0, "4")):
        with pytest.raises(ValueError, match=f"of {number} positions here: pictures have {shown}"):
            grammar.of_length(number)
