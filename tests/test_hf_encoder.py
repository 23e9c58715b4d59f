"""Hugging Face encoders: a directory opens as a program that says what transformers says, by its weights' own names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from frontend.hf_encoder import is_encoder
from frontend.open import open_model, open_outline
from ir.analysis import blocks, linear_sites
from ir.errors import UnsupportedError
from ir.parse import parse
from ir.program import TYPE, Program
from ir.text import dump
from ir.verify import verify
from passes.equiv.discover import discover
from tests.architectures import VOCAB, ids_for, randomise

pytestmark = pytest.mark.usefixtures("own_cache")

aten = torch.ops.aten
WIDTH, LENGTH = 32, 40
_SHAPE = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": LENGTH,
}
_DISTIL = {"dim": WIDTH, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "vocab_size": VOCAB}
FIELDS: dict[str, dict[str, Any]] = {
    "Bert": _SHAPE,
    "DistilBert": {**_DISTIL, "max_position_embeddings": LENGTH},
    "Roberta": {**_SHAPE, "type_vocab_size": 1},
}
TYPED = {"Bert"}


def build(kind: str, head: str = "Model", **fields: Any) -> nn.Module:
    """A tiny seeded encoder of transformers, with a head or bare."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(**{**FIELDS[kind], **fields})
    model: nn.Module = getattr(transformers, kind + head)(config)
    randomise(model)
    return model.eval()


def write(folder: Path, model: nn.Module) -> Path:
    model.save_pretrained(str(folder))  # type: ignore[operator]
    return folder


def inputs_for(kind: str, batch: int, seq: int, padded: bool) -> dict[str, Tensor]:
    """Token ids, a mask that hides more tokens of each row at the right, and token types of both values."""
    shown = torch.arange(seq, seq - batch, -1).clamp(min=1) if padded else torch.full((batch,), seq)
    values = {"input_ids": ids_for(batch, seq), "attention_mask": (torch.arange(seq) < shown[:, None]).long()}
    return values | ({"token_type_ids": ids_for(batch, seq, seed=2) % 2} if kind in TYPED else {})


def run(program: Program, values: dict[str, Tensor]) -> Tensor:
    assert [node.name for node in program.inputs] == list(values)
    with torch.no_grad():
        (found,) = program.module()(*values.values())
    return found


def expected(model: nn.Module, values: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        wanted: Tensor = model(**values).last_hidden_state
    return wanted


def assert_same(program: Program, model: nn.Module, values: dict[str, Tensor]) -> None:
    found, wanted, shown = run(program, values), expected(model, values), values["attention_mask"].bool()
    assert wanted.std() > 0.1, "states that are all alike would prove nothing"
    torch.testing.assert_close(found[shown], wanted[shown], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", FIELDS)
def test_an_opened_encoder_equals_its_model(kind: str, tmp_path: Path) -> None:
    model = build(kind)
    opened = open_model(str(write(tmp_path / kind, model)))
    assert opened.kind == "hf" and opened.program.name == kind
    for batch, seq in ((1, 1), (2, 5), (3, 17), (4, LENGTH - 2)):
        for padded in (False, True):
            assert_same(opened.program, model, inputs_for(kind, batch, seq, padded))


@pytest.mark.parametrize("kind", FIELDS)
def test_form_of_an_encoder(kind: str, tmp_path: Path) -> None:
    model = build(kind)
    program = open_model(str(write(tmp_path / "m", model))).program
    verify(program, full=True)
    text = dump(program)
    assert dump(parse(text, program.params)) == text
    assert [n.name for n in program.outputs] == ["last_hidden_state"]
    assert [str(n.meta[TYPE]) for n in program.outputs] == [f"f32[batch,seq,{WIDTH}]"]
    assert {str(n.meta[TYPE]) for n in program.inputs} == {"i64[batch,seq]"}
    assert program.symbols == ("batch", "seq") and program.facts == {"canonical"}
    assert program.attributes == {
        "model_type": kind.lower(),
        "layers": 2,
        "attention": "sdpa",
        "outputs": ["last_hidden_state"],
    }
    found = blocks(program)
    assert len(found) == 2 and len(found[0].nodes) == len(found[1].nodes)
    assert [len(linear_sites(program, block.nodes)[0]) for block in found] == [6, 6]
    assert len(list(program.calls(aten.scaled_dot_product_attention))) == 2
    assert [group.kind for group in discover(program).groups] == ["q<->k", "v->o"] * 2


def test_a_second_opening_reads_the_trace(tmp_path: Path) -> None:
    folder, said = write(tmp_path / "m", build("Bert", intermediate_size=48)), list[str]()
    open_model(str(folder), said.append)
    assert said == ["tracing bert, once for this configuration"]
    open_model(str(folder), said.append)
    assert len(said) == 1


def test_outline_of_an_encoder(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", build("Bert", num_hidden_layers=4))
    outline = open_outline(str(folder))
    assert (outline.layers, outline.remark) == (4, "from a trace of 2 of 4 layers")
    assert len(blocks(outline.program)) == 2
    open_model(str(folder))
    assert open_outline(str(folder)).remark == "from the traced graph"


@pytest.mark.parametrize("kind", FIELDS)
def test_the_encoder_of_a_model_with_a_head_is_taken_and_said_to_be(kind: str, tmp_path: Path) -> None:
    model, said = build(kind, "ForMaskedLM"), list[str]()
    program = open_model(str(write(tmp_path / "m", model)), said.append).program
    assert f"only the encoder is taken; the head of {kind}ForMaskedLM is left out" in said
    assert not any("conversion" in line for line in said)
    assert_same(program, model.base_model, inputs_for(kind, 2, 7, True))  # type: ignore[arg-type]


def test_a_checkpoint_without_the_encoder_is_refused_by_name(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", build("Bert", "ForMaskedLM"))
    file = folder / "model.safetensors"
    other = {name.replace("bert.", "body."): value for name, value in load_file(file).items()}
    save_file(other, file, metadata={"format": "pt"})
    with pytest.raises(UnsupportedError, match="lacks weights") as caught:
        open_model(str(folder))
    assert "embeddings" in caught.value.why


def test_stored_positions_are_not_read(tmp_path: Path) -> None:
    model = build("Bert")
    folder = write(tmp_path / "m", model)
    file = folder / "model.safetensors"
    save_file(load_file(file) | {"embeddings.position_ids": torch.zeros(1, 7)}, file, metadata={"format": "pt"})
    assert_same(open_model(str(folder)).program, model, inputs_for("Bert", 2, 7, True))


def test_old_spellings_of_gains_are_converted(tmp_path: Path) -> None:
    model, said = build("Bert", "ForMaskedLM"), list[str]()
    folder = write(tmp_path / "m", model)
    file = folder / "model.safetensors"
    old = {
        n.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): v for n, v in load_file(file).items()
    }
    save_file(old, file, metadata={"format": "pt"})
    program = open_model(str(folder), said.append).program
    assert any("conversion" in line for line in said)
    assert_same(program, model.base_model, inputs_for("Bert", 2, 7, True))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "named", "encoder"),
    [
        ("Bert", ["BertModel"], True),
        ("Bert", ["BertForSequenceClassification"], True),
        ("Roberta", ["RobertaForMaskedLM"], True),
        ("Bert", None, False),
        ("Bert", [], False),
        ("Bert", "BertModel", False),
        ("Bert", [["BertModel"]], False),
        ("Bert", ["BertLMHeadModel"], False),
        ("Roberta", ["RobertaForCausalLM"], False),
        ("Llama", ["LlamaModel"], False),
        ("GPT2", ["GPT2Model"], False),
        ("Mamba", ["MambaModel"], False),
        ("Rwkv", ["RwkvModel"], False),
        ("XLNet", ["XLNetModel"], False),
        ("Bart", ["BartModel"], False),
    ],
)
def test_which_configurations_are_encoders(kind: str, named: Any, encoder: bool) -> None:
    import transformers

    config = getattr(transformers, f"{kind}Config")(architectures=named)
    assert is_encoder(config) is encoder


def test_a_configuration_set_to_decode_is_no_encoder() -> None:
    from transformers import BertConfig

    assert not is_encoder(BertConfig(architectures=["BertModel"], is_decoder=True))


def test_an_encoder_that_hides_what_it_is_gets_told_how_to_say_it(tmp_path: Path) -> None:
    model = build("Bert")
    folder = write(tmp_path / "m", model)
    model.config.architectures = None  # type: ignore[union-attr]
    model.config.save_pretrained(str(folder))  # type: ignore[union-attr, operator]
    with pytest.raises(UnsupportedError, match="no key/value cache") as caught:
        open_model(str(folder))
    assert "names its class" in caught.value.fix


@pytest.mark.real
def test_the_sentence_encoder_equals_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer, BertModel

    monkeypatch.delenv("XDG_CACHE_HOME")
    opened = open_model("all-minilm-l6-v2")
    program, folder = opened.program, str(opened.path)
    texts = ["A cat.", "Shifts and adds stand in for products.", "One more sentence, longer than the two before it."]
    values = dict(AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt"))
    assert int(values["attention_mask"].min()) == 0, "rows of one length would not be padded"
    values = {node.name: values[node.name] for node in program.inputs}
    wanted, found = expected(BertModel.from_pretrained(folder).eval(), values), run(program, values)
    shown = values["attention_mask"].bool()
    assert float((found - wanted)[shown].abs().max()) <= 1e-4
    verify(program, full=True)
    layers = blocks(program)
    assert len(layers) == 6 and len({len(block.nodes) for block in layers}) == 1
    assert sum(len(linear_sites(program, block.nodes)[0]) for block in layers) == 36
