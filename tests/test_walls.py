"""The walls of the house: which room may import which. Read from the source with `ast`."""

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "kizzasi"

PROGRAMS = ("kizzasi.train", "kizzasi.nas", "kizzasi.eml", "kizzasi.cli")
# What is made of the parts of a model, and so is no business of theirs.
WHOLE = (
    *("kizzasi.models.model", "kizzasi.models.build", "kizzasi.models.presets"),
    *("kizzasi.models.checkpoints", "kizzasi.models.decoding"),
    *PROGRAMS,
)
MIXERS, CHANNELS, LAYERS = (f"kizzasi.models.{room}" for room in ("mixers", "channels", "layers"))
FORMATS = "kizzasi.models.checkpoints"
# room -> the kizzasi modules it must not import; the first matching room counts.
FORBIDDEN = {
    "kizzasi.strict": ("kizzasi.models", *PROGRAMS),
    "kizzasi.models.ops": ("kizzasi.models", *PROGRAMS),
    MIXERS: (LAYERS, CHANNELS, *WHOLE),
    CHANNELS: (LAYERS, MIXERS, *WHOLE),
    "kizzasi.models.attention": (LAYERS, CHANNELS, MIXERS, "kizzasi.models.spec", *WHOLE),
    "kizzasi.models.parts": (LAYERS, CHANNELS, MIXERS, "kizzasi.models.spec", *WHOLE),
    LAYERS: (MIXERS, CHANNELS, "kizzasi.models.spec", *WHOLE),
    # Tensors in files know of no format, formats of other programs of no container of theirs.
    f"{FORMATS}.storage": (LAYERS, MIXERS, CHANNELS, *WHOLE),
    f"{FORMATS}.families": (f"{FORMATS}.gguf", f"{FORMATS}.tokenizers", *PROGRAMS),
    "kizzasi.models": PROGRAMS,
    # Search knows nothing of eml-core or of trees; trees know of neither.
    "kizzasi.eml.search": (
        "kizzasi.eml.core",
        "kizzasi.eml.exact",
        "kizzasi.train",
        "kizzasi.nas",
        "kizzasi.cli",
    ),
    "kizzasi.eml.core": ("kizzasi.eml.exact", "kizzasi.train", "kizzasi.nas", "kizzasi.cli"),
    "kizzasi.eml.exact": (
        "kizzasi.eml.core",
        "kizzasi.eml.search",
        "kizzasi.train",
        "kizzasi.nas",
        "kizzasi.cli",
    ),
    "kizzasi.eml": ("kizzasi.train", "kizzasi.nas", "kizzasi.cli"),
    "kizzasi.train": ("kizzasi.nas", "kizzasi.eml", "kizzasi.cli"),
    "kizzasi.nas": ("kizzasi.eml", "kizzasi.cli"),
}
ALLOWED = {room: (room,) for room in ("kizzasi.models.ops", f"{FORMATS}.storage")}
# Within nas, only the ready-made spaces may name a concrete mixer.
CONCRETE = (MIXERS, CHANNELS)
SPACES = {"kizzasi.nas.spaces.ready_made", "kizzasi.nas.spaces.families"}
# Within nas, a room imports only what stands before it; `search` and `__init__` stand on top.
NAS_TOP = ("kizzasi.nas.search", "kizzasi.nas.elsewhere")
NAS_ROOMS = (
    "spaces",
    "searchers",
    "schedulers",
    "evaluators",
    "tables",
    "executors",
    "results",
    "study",
    "distil",
    "report",
    "pipelines",
)
# eml sees the contract of a mixer, not the models made of them.
MIXER_CONTRACT = {
    "kizzasi.models.call",
    "kizzasi.models.cost",
    "kizzasi.models.init",
    "kizzasi.models.mixer",
    "kizzasi.models.norm",
    "kizzasi.models.ops.attention",
    # The rule by which engines are chosen, and the compiled library, in which eml has kernels too.
    "kizzasi.models.ops.engines",
    "kizzasi.models.ops.native.library",
}


@functools.cache
def modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(
            ".__init__"
        ): path
        for path in sorted(ROOT.rglob("*.py"))
    }


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: Path) -> set[str]:
    """Every kizzasi module that a file imports, at any depth of nesting."""
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            known = modules().keys() & names
            found |= known or {node.module or ""}
    return {name for name in found if name.split(".")[0] == "kizzasi"}


def within(name: str, rooms: tuple[str, ...]) -> bool:
    return any(name == room or name.startswith(room + ".") for room in rooms)


@pytest.mark.parametrize("module", modules())
def test_no_forbidden_import(module):
    room = next((r for r in FORBIDDEN if within(module, (r,))), None)
    if room is None:
        return
    for name in imports(modules()[module]):
        allowed = within(name, ALLOWED.get(room, ()))
        assert allowed or not within(name, FORBIDDEN[room]), f"{module} imports {name}"
        if module.startswith(("kizzasi.train", "kizzasi.nas")) and module not in SPACES:
            assert not within(name, CONCRETE), f"{module} names the concrete {name}"
        if module.startswith("kizzasi.eml") and name.startswith("kizzasi.models"):
            assert name in MIXER_CONTRACT, f"{module} imports {name}"


@pytest.mark.parametrize(
    "module", [m for m in modules() if m.startswith("kizzasi.nas.") and m not in NAS_TOP]
)
def test_the_rooms_of_the_search_stand_in_a_row(module):
    room = module.split(".")[2]
    before = NAS_ROOMS[: NAS_ROOMS.index(room) + 1]
    for name in imports(modules()[module]):
        if within(name, ("kizzasi.nas",)):
            below = tuple(f"kizzasi.nas.{known}" for known in before)
            assert within(name, below), f"{module} imports {name}"


@pytest.mark.parametrize("module", [m for m in modules() if m.startswith("kizzasi.models.ops")])
def test_ops_are_functions(module):
    tree = tree_of(modules()[module])
    bases = {
        ast.unparse(base) for n in ast.walk(tree) if isinstance(n, ast.ClassDef) for base in n.bases
    }
    assert not {b for b in bases if b.endswith("Module")}, f"{module} defines an nn.Module"


@pytest.mark.parametrize("module", [m for m in modules() if not m.startswith("kizzasi.cli")])
def test_library_code_has_no_side_effects(module):
    """No printing, no environment variables, no torch globals, no logging configuration."""
    banned = {
        "print",
        "os.environ",
        "os.getenv",
        "logging.basicConfig",
        "torch.manual_seed",
        "torch.set_default_dtype",
        "torch.set_default_device",
        "torch.use_deterministic_algorithms",
        "torch.set_float32_matmul_precision",
    }
    tree = tree_of(modules()[module])
    used = {ast.unparse(n) for n in ast.walk(tree) if isinstance(n, (ast.Attribute, ast.Name))}
    assert not used & banned, f"{module} uses {used & banned}"


# One architecture, one file: what may be imported within these rooms.
SIBLINGS = {
    MIXERS: set(),
    CHANNELS: {"kizzasi.models.channels.moe_routers"},  # a part of moe's
    LAYERS: {  # the contract, and what runs the layers inside a layer
        "kizzasi.models.layers.layer",
        "kizzasi.models.layers.stack",
        "kizzasi.models.layers.ragged",
    },
}


@pytest.mark.parametrize("room", SIBLINGS)
def test_siblings_do_not_know_each_other(room):
    inside = [name for name in modules() if name.startswith(f"{room}.")]
    assert len(inside) > 3
    for module in inside:
        others = {name for name in imports(modules()[module]) if name.startswith(f"{room}.")}
        assert others <= SIBLINGS[room], f"{module} imports {others}"


def at_import(body: list[ast.stmt]) -> set[str]:
    """The kizzasi modules that these statements load when a file is imported; no types only."""
    found = set()
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
            found |= at_import(node.body)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= modules().keys() & names or {node.module or ""}
    return found & modules().keys()


def test_no_two_modules_need_each_other():
    needs = {name: at_import(tree_of(path).body) for name, path in modules().items()}
    while True:  # take away what needs nothing that is left; a circle stays
        free = {name for name, wanted in needs.items() if not wanted & needs.keys()}
        if not free:
            break
        needs = {name: wanted for name, wanted in needs.items() if name not in free}
    assert not needs, f"these import each other, or what does: {sorted(needs)}"
