"""An Ollama folder: the Modelfile reads back as meant, prompts as training did, and names only what is there."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from fedtune.data.records import instruction_prompt
from fedtune.errors import ReleaseError
from fedtune.release.ollama import MODELFILE, check_ollama, write_ollama
from fedtune.release.ollama_template import find_prompting
from tests.release.chat_templates import COUNTING, GEMMA, QWEN2
from tests.release.gguf import forward
from tests.release.gguf.made import made_adapter, made_base
from tests.release.go_template import ollama_prompt

_COMMAND = re.compile(r'(FROM|ADAPTER|TEMPLATE|PARAMETER) (?:(\w+) )?(?:"""(.*?)"""|"(.*?)"|(\S+))\n', re.DOTALL)


def read_modelfile(folder: Path) -> list[tuple[str, str, str]]:
    """Commands as Ollama's parser reads them: (command, parameter, value)."""
    text, found, at = (folder / MODELFILE).read_text(), [], 0
    while at < len(text):
        match = _COMMAND.match(text, at)
        assert match, text[at:]
        found.append((match[1], match[2] or "", next(value for value in match.groups()[2:] if value is not None)))
        at = match.end()
    return found


def values(folder: Path, command: str, parameter: str = "") -> list[str]:
    return [value for name, key, value in read_modelfile(folder) if (name, key) == (command, parameter)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_base(tmp_path_factory.mktemp("ollama") / "llama", "llama")


@pytest.fixture(scope="module")
def adapter(llama: Path) -> Path:
    return made_adapter(llama.with_name("adapter"), llama)


@pytest.fixture(scope="module")
def values_only(llama: Path) -> Path:
    return made_adapter(llama.with_name("values"), llama, targets=["v_proj", "o_proj"])


def chatting_base(folder: Path, source: Path, template: str) -> Path:
    shutil.copytree(source, folder)
    (folder / "chat_template.jinja").write_text(template)
    return folder


def test_base_and_adapter_stand_beside_the_modelfile(llama: Path, adapter: Path, tmp_path: Path) -> None:
    made = write_ollama(tmp_path / "out", llama, adapter, style="text", parameters={"num_ctx": 96, "temperature": 0.0})
    assert values(made.folder, "FROM") == ["./model.gguf"]
    assert values(made.folder, "ADAPTER") == ["./adapter.gguf"]
    assert values(made.folder, "PARAMETER", "num_ctx") == ["96"]
    assert values(made.folder, "PARAMETER", "temperature") == ["0.0"]
    assert values(made.folder, "PARAMETER", "stop") == list(made.stops) == ["</s>"]
    assert set(made.sizes) == {"model.gguf", "adapter.gguf", "Modelfile"}
    assert any("--merged" in note for note in made.notes)
    assert forward.Opened(made.folder / "adapter.gguf").keys["general.type"] == "adapter"


def test_a_merged_model_needs_no_adapter(llama: Path, tmp_path: Path) -> None:
    made = write_ollama(tmp_path / "out", llama, style="text", dtype="q8_0")
    assert values(made.folder, "ADAPTER") == []
    assert made.notes == ()


def test_the_template_of_a_dialogue_study_is_the_chat_template(llama: Path, tmp_path: Path) -> None:
    base = chatting_base(tmp_path / "base", llama, QWEN2)
    made = write_ollama(tmp_path / "out", base, style="messages")
    (template,) = values(made.folder, "TEMPLATE")
    assert template == made.template
    assert ollama_prompt(template, [{"role": "user", "content": 'Say "hi"'}]) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        '<|im_start|>user\nSay "hi"<|im_end|>\n<|im_start|>assistant\n'
    )


def test_no_bos_is_written_where_the_tokenizer_adds_one(llama: Path, tmp_path: Path) -> None:
    base = chatting_base(tmp_path / "base", llama, GEMMA)
    found = find_prompting(base, "messages")
    prompt = ollama_prompt(found.template, [{"role": "user", "content": "Hello"}])
    assert prompt == "<start_of_turn>user\nHello<end_of_turn>\n<start_of_turn>model\n"
    assert any("system" in note for note in found.notes)


def test_each_style_prompts_as_its_training_did(llama: Path) -> None:
    def asked(style: str) -> str:
        return ollama_prompt(find_prompting(llama, style).template, [{"role": "user", "content": "Why {{ so }}?"}])

    assert asked("text") == "Why {{ so }}?"
    assert asked("prompt") == "Why {{ so }}?\n"
    assert asked("instruction") == instruction_prompt("Why {{ so }}?")
    assert asked("messages") == "User:\nWhy {{ so }}?\n\nAssistant:\n"  # no chat template: fedtune's own layout


def test_a_dialogue_without_a_chat_template_ends_where_training_ended_it(llama: Path) -> None:
    assert find_prompting(llama, "messages").stops == ("</s>",)


def test_every_end_of_a_generation_stops_ollama(llama: Path, tmp_path: Path) -> None:
    base = chatting_base(tmp_path / "base", llama, GEMMA)
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 1]}))
    _add_token(base, "<end_of_turn>")
    assert find_prompting(base, "messages").stops == ("<end_of_turn>", "</s>", "<s>")


def _add_token(base: Path, token: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": [token]})
    tokenizer.save_pretrained(base)


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ({"style": "classification"}, "release.no-prompt"),
        ({"style": "text", "parameters": {"temprature": 1.0}}, "release.bad-parameter"),
        ({"style": "text", "parameters": {"num_ctx": "many"}}, "release.bad-parameter"),
        ({"style": "text", "dtype": "q2_k"}, "release.unknown-dtype"),
        ({"style": "text", "adapter_format": "zip"}, "release.unknown-format"),
    ],
)
def test_what_ollama_would_not_take_is_refused_before_writing(
    given: dict[str, Any], code: str, llama: Path, adapter: Path, tmp_path: Path
) -> None:
    with pytest.raises(ReleaseError) as caught:
        write_ollama(tmp_path / "out", llama, adapter, **given)
    assert (caught.value.code, (tmp_path / "out").exists()) == (code, False)


def test_an_untranslatable_chat_template_is_refused_before_writing(llama: Path, tmp_path: Path) -> None:
    base = chatting_base(tmp_path / "base", llama, COUNTING)
    with pytest.raises(ReleaseError, match="otherwise than the second"):
        write_ollama(tmp_path / "out", base, style="messages")
    assert not (tmp_path / "out").exists()


def test_safetensors_go_to_the_families_that_ollama_converts(llama: Path, values_only: Path, tmp_path: Path) -> None:
    made = write_ollama(tmp_path / "out", llama, values_only, style="text", adapter_format="safetensors")
    assert values(made.folder, "ADAPTER") == ["./adapter"]
    assert {name for name in made.sizes if "/" in name} == {
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
    }


def test_safetensors_of_q_and_k_are_refused_because_ollama_would_change_them(llama: Path, adapter: Path) -> None:
    with pytest.raises(ReleaseError, match="rotary order") as caught:
        check_ollama(llama, adapter, style="text", adapter_format="safetensors")
    assert caught.value.code == "release.not-convertible"


def test_safetensors_of_another_family_are_refused_with_gguf_instead(tmp_path: Path) -> None:
    base = made_base(tmp_path / "qwen2", "qwen2")
    adapter = made_adapter(tmp_path / "adapter", base, targets=["v_proj"])
    with pytest.raises(ReleaseError, match="this is qwen2") as caught:
        check_ollama(base, adapter, style="text", adapter_format="safetensors")
    assert "GGUF" in caught.value.hint
    check_ollama(base, adapter, style="text")
