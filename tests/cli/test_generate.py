"""`rotary-export generate` and `bench --past`, on a bundle that counts."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
from helpers.bundles import update_hash
from helpers.commands import call
from helpers.counting_decoder import NUM_TOKENS, make_tokenizer, write_counting_decoder

from rotary_export import RotaryExportError
from rotary_export.runtime.decoder.chat import render_chat

WORDS = ["<unk>", "<eos>", *(f"w{index}" for index in range(2, NUM_TOKENS))]
WORDS[9], WORDS[10] = "\x1b[31mred\x9b1m", "\r\u202eback"
TEMPLATE = "{% for m in messages %}w3 {{ m.content }}{% endfor %} w5"
GENERATION = {"eos_token_id": 1, "pad_token_id": 0}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_counting_decoder(
        tmp_path_factory.mktemp("generate") / "counting",
        generation_config=GENERATION,
        tokenizer=make_tokenizer(WORDS),
        tokenizer_config={"chat_template": TEMPLATE, "eos_token": "<eos>"},
    )


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write_counting_decoder(tmp_path_factory.mktemp("generate") / "plain")


def generate(*arguments):
    result = call("generate", *arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_text_is_printed_and_then_the_speed(bundle):
    text, speed = generate(bundle, "--prompt", "w4 w2", "--max-new-tokens", 3).splitlines()
    assert text == " w3 w4 w5"
    assert speed.startswith("3 tokens in 0.")
    assert speed.endswith(" tokens/s")


def test_json_has_prompt_and_new_ids_and_the_new_text(bundle):
    """Rows have neither padding nor what follows their end."""
    prompts = ["--prompt", "w17", "--prompt", "w2 w3 w4"]
    found = json.loads(generate(bundle, *prompts, "--max-new-tokens", 5, "--json"))
    assert found["ids"] == [[17, 18, 19, 0, 1], [2, 3, 4, 5, 6, 7, 8, 9]]
    assert found["text"] == [" w18 w19 <unk> <eos>", f" w5 w6 w7 w8 {WORDS[9]}"]
    assert found["tokens_per_second"] > 0
    printed = generate(bundle, *prompts, "--max-new-tokens", 2).splitlines()
    assert printed[:4] == ["prompt 1:", " w18 w19", "prompt 2:", " w5 w6"]


def test_ids_need_no_tokenizer(bundle, plain):
    assert generate(plain, "--ids", "4,2", "--max-new-tokens", 3).splitlines()[0] == "3,4,5"
    assert generate(bundle, "--ids", "4,2", "--max-new-tokens", 2).splitlines()[0] == " w3 w4"
    found = json.loads(generate(plain, "--ids", "4, 2", "--max-new-tokens", 1, "--json"))
    assert (found["ids"], found["text"]) == ([[4, 2, 3]], None)


def test_escape_sequences_reach_no_terminal(bundle):
    text = generate(bundle, "--prompt", "w8", "--max-new-tokens", 2).splitlines()[0]
    assert text == r" \x1b[31mred\x9b1m \r\u202eback"


def test_a_chat_template_is_applied(bundle):
    found = json.loads(
        generate(bundle, "--prompt", "w7", "--chat", "--max-new-tokens", 1, "--json")
    )
    assert found["ids"] == [[3, 7, 5, 6]]


def test_sampling_flags(bundle):
    flags = "--sample", "--temperature", "9", "--top-k", "0", "--top-p", "1.0", "--max-new-tokens"
    first, second = (
        json.loads(generate(bundle, "--ids", "4", *flags, 30, "--seed", seed, "--json"))["ids"]
        for seed in (1, 1)
    )
    assert first == second
    assert first != [[4, 5, 6]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give --prompt or --ids."),
        (["--ids", "1", "--prompt", "w2"], "Give --prompt or --ids."),
        (["--ids", "1", "--chat"], "--chat is for --prompt."),
        (["--ids", "1,x"], "'x' is not an integer >= 0"),
        (["--ids", "1", "--top-k", "3"], "--top-k needs --sample."),
        (["--ids", "99"], "token ids must be >= 0 and < 20, got 99 in row 0, column 0"),
        (["--ids", "3", "--max-new-tokens", "65"], "max_new_tokens must be <= 64 after a prompt"),
        (["--prompt", " "], "the prompt ' ' has no tokens"),
        (["--ids", "3", "--sample", "--top-p", "2"], "top_p must be > 0 and <= 1, got 2.0"),
    ],
)
def test_mistakes(bundle, arguments, message):
    result = call("generate", bundle, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_what_the_bundle_lacks(bundle, plain, tmp_path, monkeypatch):
    def fail(*arguments):
        result = call("generate", *arguments)
        assert (result.exit_code, result.stdout) == (2, "")
        return result.stderr

    assert "has no tokenizer.json: pass token ids (--ids)" in fail(plain, "--prompt", "w2")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert "needs tokenizers: pip install '.[generate]'" in fail(bundle, "--prompt", "w2")
    monkeypatch.undo()
    changed = shutil.copytree(bundle, tmp_path / "b")
    (changed / "tokenizer.json").write_text("{}")
    assert "tokenizer.json in " in call("generate", changed, "--prompt", "w2").stderr
    update_hash(changed, "tokenizer.json")
    assert "tokenizer.json can't be read, its contents do not fit" in fail(changed, "--prompt", "w")
    same = write_counting_decoder(tmp_path / "c", has_mask=False)
    assert "rows must be of the same length" in fail(same, "--ids", "1", "--ids", "1,2")


def test_chat_templates_run_in_a_sandbox():
    def render(template, **config):
        return render_chat(template, "hello", config)

    blocks = "{% set ns = namespace(n=0) %}{% generation %}{{ bos_token }}{% endgeneration %}"
    assert render(f"{blocks}{{{{ messages | tojson }}}}", bos_token={"content": "<s>"}) == (
        '<s>[{"role": "user", "content": "hello"}]'
    )
    for template, message in (
        ("", "the bundle has no chat template"),
        ("{{ raise_exception('no user') }}", "the chat template fails: no user"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "immutable|safe"),
        ("{% set ns = namespace(__class__=1) %}", "no attribute '__class__'"),
        ("{% if %}", "the chat template fails: "),
    ):
        with pytest.raises(RotaryExportError, match=message):
            render(template)


def test_bench_times_prompts_and_the_tokens_after_them(bundle):
    report = json.loads(call("bench", bundle, "--past", "0,8", "--seconds", 0.01, "--json").stdout)
    runs = {row["run"] for row in report["rows"]}
    assert runs == {"ONNX Runtime, function body", "ONNX Runtime, op library"}
    assert [row["past"] for row in report["rows"]] == [0, 0, 8, 8]
    assert [row["prefill_seconds"] is None for row in report["rows"]] == [True, True, False, False]
    assert all(0 < row["decode_seconds"]["min"] < 0.1 for row in report["rows"])
    table = call("bench", bundle, "--past", "8", "--seconds", 0.01).stdout
    assert "prefill tokens/s" in table
    result = call("bench", bundle, "--past", "60")
    assert result.exit_code == 2
    assert "past must be <= 55, as the model has 64 positions, got 60" in result.stderr
    assert "Give --shape or --past." in call("bench", bundle, "--past", "1", "--shape", 1, 1).stderr
