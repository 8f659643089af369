"""Templates with holes: every move stays inside, genes come from parents, sizes are exact."""

import itertools
import json

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from kizzasi.errors import SpecError
from kizzasi.models import BlockSpec, ModelSpec, Signal, Tokens, build_model, mixers
from kizzasi.models.layers import LoopSpec
from kizzasi.nas import spaces
from kizzasi.nas.searchers import Evolution, run
from kizzasi.nas.spaces.describe import describe, name_of
from kizzasi.nas.spaces.families import ArchCandidate, ArchSearchSpace
from kizzasi.nas.spaces.model_space import Candidate, ModelSpace
from kizzasi.nas.spaces.rng import Xorshift64
from kizzasi.nas.spaces.template.parse import choice, pattern, repeat

STEM = {"kind": "tokens", "vocab_size": 7}
MAMBA = {"mixer": {"kind": "mamba", "d_state": choice(2, 3)}}
HEADS = {
    "mixer": {"kind": "attention", "n_heads": choice(2, 3, 5)},
    "channel": choice(None, {"kind": "mlp", "hidden": choice(4, 8)}),
}
seeds = st.integers(1, 2**64 - 1)


def model(blocks, d_model=16, **more):
    return ModelSpace({"d_model": d_model, "stem": STEM, "blocks": blocks, **more})


def numbers(values, most=3):
    """A number, or a hole for a few of them."""
    some = st.lists(values, min_size=1, max_size=most, unique=True)
    return some.map(lambda options: options[0] if len(options) == 1 else choice(*options))


channels = st.one_of(
    st.none(),
    st.builds(lambda h: choice(None, {"kind": "mlp", "hidden": h}), numbers(st.integers(1, 9))),
    st.builds(lambda h: {"kind": "swiglu", "hidden": h}, numbers(st.integers(1, 9), 2)),
)
kinds = {
    "mamba": numbers(st.integers(1, 4), 2).map(lambda n: {"kind": "mamba", "d_state": n}),
    "attention": numbers(st.sampled_from([1, 2, 3, 4]), 3).map(
        lambda n: {"kind": "attention", "n_heads": n}
    ),
    "rwkv7": numbers(st.sampled_from([4, 6, 8]), 2).map(lambda n: {"kind": "rwkv7", "head_dim": n}),
}


@st.composite
def blocks_of(draw, names=tuple(kinds)):
    """A block, or a choice of blocks of different mixers."""
    chosen = draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True))
    options = [{"mixer": draw(kinds[name]), "channel": draw(channels)} for name in chosen]
    return options[0] if len(options) == 1 else choice(*options)


@st.composite
def templates(draw):
    """Small unambiguous templates, with mixers that do not fit some of the widths."""
    form = draw(st.sampled_from(["list", "repeat", "pattern", "both"]))
    if form == "list":
        blocks = draw(st.lists(blocks_of(), min_size=1, max_size=2))
    elif form == "repeat":
        blocks = repeat(draw(blocks_of()), 1, draw(st.integers(1, 2)))
    elif form == "pattern":
        a, b = draw(kinds["mamba"]), draw(blocks_of(("attention", "rwkv7")))
        depths = draw(numbers(st.integers(2, 4)))
        blocks = pattern("ab", "aab", "b", n_layers=depths, a={"mixer": a}, b=b)
    else:
        blocks = [draw(blocks_of(("mamba",))), repeat(draw(blocks_of(("attention",))), 1, 2)]
    widths = draw(numbers(st.sampled_from([8, 12, 18])))
    dropout = draw(numbers(st.sampled_from([0.0, 0.1]), 2))
    return {"d_model": widths, "stem": STEM, "dropout": dropout, "blocks": blocks}


def spaces_or_none(template):
    """The space if it has members, and few; widths may fit none of the heads."""
    space = ModelSpace(template)
    return space if 0 < space.size < 80 else None


possible = templates().map(spaces_or_none).filter(bool)


@given(space=possible, seed=seeds, prob=st.floats(0, 1))
@settings(deadline=None, max_examples=30)
def test_moves_stay_in_the_space(space, seed, prob):
    rng = Xorshift64(seed)
    a, b = space.sample(rng), space.sample(rng)
    child = space.crossover(a, b, rng)
    for made in (a, b, child, space.mutate(child, rng, prob)):
        made.spec.check()
        assert space.contains(made)
        assert space.decode(json.loads(json.dumps(made.to_dict()))) == made
        assert ModelSpec.from_dict(json.loads(json.dumps(made.spec.to_dict()))) == made.spec
    same = space.mutate(a, rng, 0.0)
    assert same == a
    assert same.genes == a.genes


@given(space=possible, seed=seeds)
@settings(deadline=None, max_examples=30)
def test_genes_come_from_the_parents(space, seed):
    rng = Xorshift64(seed)
    a, b = space.sample(rng), space.sample(rng)
    assert set(space.crossover(a, b, rng).genes) <= set(a.genes) | set(b.genes)


@given(space=possible)
@settings(deadline=None, max_examples=12)
def test_iterate_is_unique_and_complete(space):
    members = space.iterate()
    assert len(members) == len(set(members)) == len({m.spec.digest for m in members}) == space.size
    assert all(map(space.contains, members[:9]))
    assert list(space.iterate(3)) == list(members[:3])
    rng = Xorshift64(5)
    assert {space.sample(rng) for _ in range(20)} <= set(members)


@given(space=possible)
@settings(deadline=None, max_examples=12)
def test_every_member_is_found_from_its_model_and_no_other(space):
    members = space.iterate()
    for member in members:
        found = space.encode(member.spec)
        assert found == member
        assert found.genes == member.genes  # these spaces make no model in two ways
        assert space.contains(found)
        stranger = member.spec.replace(dropout=0.3)
        assert space.encode(stranger) is None
        assert space.encode(member.spec.replace(blocks=member.spec.blocks * 9)) is None


def test_a_model_that_breaks_a_rule_is_found_in_no_template():
    space = model([MAMBA], dropout=choice(0.0, 1.0))
    assert space.size == 2, "of four fillings, those that are models"
    spec = space.sample(Xorshift64(1)).spec
    assert space.encode(spec).spec == spec
    with pytest.raises(SpecError, match="dropout"):
        space.encode(spec.replace(dropout=1.0))


def test_an_equal_layer_is_made_once_and_a_misfit_never(monkeypatch):
    space = model(repeat(HEADS, 6, 6))
    checked, check = [], mixers.AttentionSpec.check

    def counted(self, d_model, path):
        checked.append(self.n_heads)
        check(self, d_model, path)

    monkeypatch.setattr(mixers.AttentionSpec, "check", counted)
    monkeypatch.setattr(ModelSpec, "check", lambda self: None)  # which checks all of them again
    rng = Xorshift64(4)
    made = [space.sample(rng) for _ in range(9)]
    assert {block.mixer.n_heads for one in made for block in one.spec.blocks} == {2}
    assert checked.count(2) == 1
    assert checked.count(3) > 1, "what does not fit is refused each time"


def test_a_template_without_holes_knows_its_only_model():
    space = model([{"mixer": {"kind": "mamba", "d_state": 2}}])
    assert space.encode(space.sample(Xorshift64(1)).spec).genes == ()


@given(space=possible, seed=seeds)
@settings(deadline=None, max_examples=20)
def test_equal_seeds_give_equal_candidates(space, seed):
    twin = ModelSpace(yaml.safe_load(yaml.safe_dump(space.template)))
    assert space.sample(Xorshift64(seed)) == twin.sample(Xorshift64(seed))


def test_each_layer_chooses_for_itself():
    space = model(repeat(choice(MAMBA, HEADS), 1, 3))
    # Of the heads only 2 divides 16: 2 Mambas and 1 * (1 + 2) attentions make 5 blocks.
    assert space.size == 5 + 5**2 + 5**3
    seen = {tuple(b.mixer.kind for b in c.spec.blocks) for c in space.iterate()}
    every = itertools.chain(
        *(itertools.product(("mamba", "attention"), repeat=n) for n in (1, 2, 3))
    )
    assert seen == set(every)


def test_a_huge_space_is_counted_and_sampled():
    space = model(repeat(choice(MAMBA, HEADS), 100, 101))
    assert space.size == 5**100 + 5**101
    assert len(space.sample(Xorshift64(3)).spec.blocks) in (100, 101)
    assert len(space.iterate(2)) == 2


def test_pattern_shares_a_letter_and_forgets_unused_ones():
    space = model(pattern("mh", "m", n_layers=choice(1, 4), m=MAMBA, h=HEADS))
    # "m" at depth 1 twice: one tiling; "mmmm"; "mhmh" with 2 * 3 fillings.
    assert space.size == 2 + 2 + 2 * 3
    for candidate in space.iterate():
        blocks = candidate.spec.blocks
        assert len(blocks) in (1, 4)
        assert len(set(blocks[::2])) == 1
        assert "blocks.h" not in str(candidate.genes) or len(set(blocks)) == 2


def test_a_choice_of_models_and_of_lists():
    two = {"d_model": 8, "stem": STEM, "blocks": [MAMBA, MAMBA]}
    one = {"d_model": 16, "stem": STEM, "blocks": choice([MAMBA], [HEADS, HEADS])}
    space = ModelSpace(choice(two, one))
    assert space.size == len(space.iterate()) == 4 + 2 + 9
    assert {c.spec.d_model for c in space.iterate()} == {8, 16}


def test_specs_may_stand_in_a_template():
    block = BlockSpec(mixers.MambaSpec(d_state=4))
    space = ModelSpace(
        {"d_model": 8, "stem": Signal(2, 2), "blocks": [block, choice(block, MAMBA)]}
    )
    assert space.size == 3
    candidate = space.iterate()[0]
    assert candidate.to_spec(stem=Signal(2, 2)) == candidate.spec
    assert name_of(candidate.spec) == "d8 2xmamba"
    loop = ModelSpec(8, (LoopSpec((BlockSpec(mixers.MambaSpec()),), n_loops=2),), Signal(1, 1))
    assert name_of(loop) == "d8 loop(mamba)"
    assert ModelSpace(json.loads(json.dumps(space.template))).size == 3


def test_a_stem_is_never_replaced_without_a_word():
    candidate = model([MAMBA]).sample(Xorshift64(1))
    assert candidate.to_spec().stem == candidate.to_spec(stem=Tokens(7)).stem == Tokens(7)
    with pytest.raises(SpecError, match=r"stem: .*vocab_size=7.* the task needs .*256"):
        candidate.to_spec(stem=Tokens(256))
    longer = ModelSpace({**model([MAMBA]).template, "stem": Tokens(7, max_positions=9)})
    assert longer.sample(Xorshift64(1)).to_spec(stem=Tokens(7)).stem.max_positions == 9


def test_a_file_may_leave_the_stem_to_the_task(tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text("{d_model: 8, blocks: [{mixer: {kind: mamba}}]}")
    space = ModelSpace.from_file(path, Signal(2, 3))
    assert space.sample(Xorshift64(1)).spec.stem == Signal(2, 3)


def test_every_kind_of_candidate_is_described():
    genes = ArchSearchSpace().sample(Xorshift64(1))
    mixed = model([MAMBA]).sample(Xorshift64(1))
    for candidate, stem in ((genes, Tokens(9)), (mixed, Tokens(7)), (mixed.spec, None)):
        told = describe(candidate, stem)
        assert isinstance(told.spec, ModelSpec)
        assert told.name
        assert told.family
    assert describe(genes, Tokens(9)).proxy == genes.proxy_score()
    assert describe(mixed, None).family == "mostly mamba"
    with pytest.raises(SpecError, match=r"stem: .*give stem"):
        describe(genes, None)


def test_build_asks_for_every_gene():
    asked = []
    old = ArchSearchSpace()
    made = old.build(lambda gene, n: asked.append((gene, n)) or n - 1)
    assert asked[0] == ("d_model", 4)
    assert made == ArchCandidate(512, 64, 12, "transformer", 4.0, 0.2)
    space = model(repeat(MAMBA, 1, 2), d_model=choice(8, 16))
    made = space.build(lambda gene, n: n - 1)
    assert [gene for gene, _ in made.genes] == [
        "d_model",
        "blocks",
        "blocks[0].mixer.d_state",
        "blocks[1].mixer.d_state",
    ]


def test_parts_that_never_fit_are_an_error_and_not_a_loop():
    space = model([MAMBA, {"mixer": {"kind": "attention", "n_heads": choice(3, 5)}}])
    assert space.size == 0
    assert space.iterate() == []
    with pytest.raises(SpecError, match=r"50 samples were all invalid.*blocks\[1\].mixer"):
        space.sample(Xorshift64(1))


def test_frames_that_are_invalid_are_left_out():
    """A tied head needs tokens; the search through the other frames does not get lost in these."""
    stems = choice(STEM, {"kind": "signal", "n_in": 2, "n_out": 2})
    space = model(repeat(MAMBA, 30, 30), stem=stems, tie_head=choice(True, False))
    assert space.size == 3 * 2**30
    tail = {"kind": "attention", "n_heads": 5}
    space = model([repeat(MAMBA, 30, 30), {"mixer": tail}], d_model=choice(16, 20))
    assert space.size == 2**30
    assert space.iterate(1)[0].spec.d_model == 20


def test_a_new_width_repairs_the_parts_that_break():
    space = model(repeat(HEADS, 6, 6), d_model=choice(12, 30))  # 5 heads fit 30 only
    rng = Xorshift64(7)
    drawn = (space.sample(rng) for _ in range(100))
    wide = next(c for c in drawn if any(b.mixer.n_heads == 5 for b in c.spec.blocks))
    narrow = [c for c in (space.mutate(wide, rng, 0.5) for _ in range(20)) if c.spec.d_model == 12]
    assert narrow
    assert all(b.mixer.n_heads in (2, 3) for c in narrow for b in c.spec.blocks)


TEXT = """
d_model: {choice: [16, 24]}
stem: {kind: tokens, vocab_size: 7}
blocks:
  repeat:
    choice:
      - mixer: {kind: mamba, d_state: {choice: [2, 3]}}
      - mixer: {kind: attention, n_heads: 2}
        channel: {choice: [null, {kind: mlp}]}
  low: 1
  high: 2
"""


def test_yaml(tmp_path):
    file = tmp_path / "space.yaml"
    file.write_text(TEXT)
    space = ModelSpace.from_file(file)
    assert space.size == 2 * (4 + 4**2)
    build_model(space.sample(Xorshift64(2)).spec)
    with pytest.raises(SpecError, match=r"nowhere.yaml: cannot read the space"):
        ModelSpace.from_file(tmp_path / "nowhere.yaml")
    file.write_text("a: [")
    with pytest.raises(SpecError, match=r"space.yaml: not YAML"):
        ModelSpace.from_file(file)
    file.write_text(TEXT.replace("d_state", "d_sate"))
    with pytest.raises(SpecError, match=r"space.yaml: blocks\[\]:0.mixer.d_sate: .*mean d_state"):
        ModelSpace.from_file(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_modle": 3}, "d_modle: unknown; did you mean d_model"),
        ({"d_model": choice(16, "wide")}, "d_model: expected int, got 'wide'"),
        ({"d_model": choice()}, "d_model: choice: no options"),
        ({"d_model": {"choice": 3}}, "d_model: choice: expected a list"),
        ({"d_model": choice(8, 8)}, "d_model: choice: 8 occurs twice"),
        ({"d_model": {"choice": [8], "chance": 1}}, "d_model: .* choice stands alone"),
        ({"blocks": []}, "blocks: empty; give at least one block"),
        ({"blocks": 3}, "blocks: expected blocks"),
        ({"blocks": [{}]}, r"blocks\[0\].mixer: missing"),
        ({"blocks": [{"mixr": {}}]}, r"blocks\[0\].mixr: unknown; did you mean mixer"),
        ({"blocks": repeat(MAMBA, 0, 2)}, "blocks: repeat: 0 to 2 copies"),
        ({"blocks": repeat(MAMBA, 3, 2)}, "blocks: repeat: 3 to 2 copies"),
        ({"blocks": repeat(MAMBA, 1, "2")}, "blocks.high: expected int"),
        ({"blocks": {"repeat": MAMBA, "low": 1}}, "blocks: .* a repeat has the keys"),
        (
            {"blocks": [choice(MAMBA, {"mixer": {"kind": "mamba", "d_state": choice(2, "x")}})]},
            r"blocks\[0\]:1.mixer.d_state: expected int",
        ),
        (
            {"blocks": [{"mixer": choice({"kind": "mamba"}, {"kind": "mamab"})}]},
            r"blocks\[0\].mixer.kind: 'mamab' unknown; did you mean mamba",
        ),
        ({"blocks": pattern("mx", n_layers=2, m=MAMBA)}, r"blocks: no block given for \['x'\]"),
        ({"blocks": pattern("m", n_layers=2, m=MAMBA, h=HEADS)}, r"letters \['h'\] do not occur"),
        ({"blocks": pattern("m", n_layers=0, m=MAMBA)}, "blocks.n_layers: 0 is not positive"),
        ({"blocks": {"pattern": "m", "letters": {"m": MAMBA}}}, "a pattern has the keys"),
    ],
)
def test_errors_carry_paths(change, message):
    with pytest.raises(SpecError, match=message):
        ModelSpace({"d_model": 16, "stem": STEM, "blocks": [MAMBA], **change})


@pytest.mark.parametrize("template", [3, [MAMBA], {"d_model": 8}, repeat({"d_model": 8}, 1, 2)])
def test_what_is_no_model_is_refused(template):
    with pytest.raises(SpecError):
        ModelSpace(template)


@pytest.mark.parametrize(
    ("genes", "message"),
    [
        ({}, "blocks: this gene is missing"),
        ({"blocks": 2}, "blocks: 2 is not one of the 2 options"),
        ({"blocks": 0, "blocks[0].mixer.d_state": "1"}, "d_state: expected int"),
        ({"blocks": 0, "blocks[0].mixer.d_state": 1, "d_model": 0}, "d_model: no such hole"),
    ],
)
def test_foreign_genes_are_refused(genes, message):
    space = model(repeat(MAMBA, 1, 2))
    with pytest.raises(SpecError, match=message):
        space.decode(genes)
    candidate = space.sample(Xorshift64(1))
    assert not space.contains(Candidate(candidate.spec, tuple(genes.items())))
    assert not space.contains("model")


@pytest.mark.parametrize("name", ["tiny", "hybrid", "mamba_rwkv", "moe"])
def test_ready_made_spaces(name):
    space = getattr(spaces, name)(Tokens(11))
    rng = Xorshift64(9)
    made = [space.sample(rng) for _ in range(12)]
    assert all(candidate.spec.stem == Tokens(11) for candidate in made)
    for candidate in made[:4]:
        found = space.encode(candidate.spec)
        assert found == candidate
        assert found.genes == space.decode(found.to_dict()).genes, "in the order of filling"
    assert len({candidate.spec.digest for candidate in made}) > 8
    assert space.size >= 1752
    build_model(made[0].spec)


def test_evolution_over_models():
    """A searcher that knows nothing of models finds the smallest one."""
    searcher = Evolution(8, 10, 3, mutation_prob=0.3, seed=2)
    best, score = run(
        searcher, spaces.tiny(), lambda batch: [-c.spec.cost(1).params for c in batch]
    ).best()
    assert best.spec.d_model == 32
    assert len(best.spec.blocks) == 1
    assert score == -best.spec.cost(1).params


def options_of(data):
    """The choices of every kind of part in a template, by field."""
    if isinstance(data, dict):
        if "kind" in data:
            holes = {k: v["choice"] for k, v in data.items() if isinstance(v, dict)}
            yield data["kind"], holes
        for value in data.values():
            yield from options_of(value)
    elif isinstance(data, list):
        for value in data:
            yield from options_of(value)


def test_what_the_usual_space_chooses_from():
    """A number nudged here is another space, and every run's figures are of this one."""
    found = dict(options_of(spaces.hybrid().template))
    assert found.pop("swiglu") == {"hidden": [None, {"choice": [64, 128, 256, 384]}]}
    heads = {"n_heads": [2, 4, 8]}
    assert found == {
        "tokens": {},
        "mlp": {"hidden": [128, 256]},
        "mamba": {"d_state": [8, 16, 32], "expand": [1.0, 1.5, 2.0]},
        "mamba2": {"d_state": [16, 32, 64], "head_dim": [16, 32]},
        "rwkv7": {"head_dim": [8, 16, 32]},
        "gla": {"expand_k": [0.5, 1.0], **heads},
        "gated_delta": heads,
        "retention": heads,
        "s4d": {"d_state": [16, 64]},
        "attention": {"window": [None, 32, 128], **heads},
    }
