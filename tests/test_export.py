"""export.py and the page it writes: in a real Chromium, and against Python on the same weights."""

import copy
import json
import math
import os
import re
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from browser import Browser, NoChromium, find_chromium
from test_cli import assert_refused, command, contents  # noqa: F401

import checkpoint
import export
import generate
import utils
from model import GPT, MLP, GPTConfig
from modern import Modern, ModernConfig
from tokenizer import ByteTokenizer, CharTokenizer, LibraryTokenizer, load_tokenizer, save_tokenizer, train_bpe
from utils import UserError

ROOT = Path(__file__).resolve().parent.parent
CHARS = sorted(set("\n !\"&'(),-.:;<=>?/" + "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ" + "äöüß€🙂"))
EVIL = "</script><img src=x onerror=\"window.ran='yes'\"><b>&amp;</b><!-- <script>window.ran='yes'</script>"


# ---------------------------------------------------------------------------------------------------------------------
# Models and their pages


def random_model(make_model, arch, vocab_size, seed=0, **sizes):
    """A tiny model whose every parameter is random, of either architecture."""
    sizes = {**dict(block_size=32, n_layer=3, n_head=2, n_embd=32), **sizes}
    if arch == "gpt":
        return make_model(seed, vocab_size=vocab_size, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Modern(ModernConfig(vocab_size=vocab_size, **sizes))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.2 * torch.randn_like(p))
    return model.eval()


@pytest.fixture(scope="session")
def byte_pairs():
    """A byte-level BPE of GPT-2's kind, with a token that looks like HTML."""
    pytest.importorskip("tokenizers")
    text = (ROOT / "input.txt").read_text(encoding="utf-8")[:50_000]
    bpe = train_bpe([text + "naïve café — 東京 🙂 can't 12 345\t\r\n  x\n\n" * 5], 500)._tokenizer
    bpe.add_special_tokens(["<|endoftext|>", "<img src=x onerror=window.ran=1>"])
    return LibraryTokenizer(bpe)


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    try:
        chromium = find_chromium()
    except NoChromium as error:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(str(error))
    with Browser(chromium, tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


class Exported:
    """A model, what a page holds of it, and the page, open."""

    def __init__(self, browser, directory, model, tokenizer, how, prompt):
        self.model, self.tokenizer, self.how = model, tokenizer, how
        self.rounded = export.rounded(model, how)
        spec = export.tokenizer_spec(tokenizer, "out")
        self.path = directory / "model.html"
        self.path.write_text(export.build_page(model, spec, how, prompt, EVIL), encoding="utf-8", newline="\n")
        self.page = self.open(browser)

    def open(self, browser, hash=""):
        page = browser.open(self.path.as_uri() + hash)
        page.wait("!byId('run').disabled")
        return page

    def answer(self, question, **details):
        return self.page.evaluate(f"ask({json.dumps(question)}, {json.dumps(details)})")

    def numbers(self, question, field, **details):
        return torch.tensor(self.page.evaluate(f"ask('{question}', {json.dumps(details)}).then(a => [...a.{field}])"))


KINDS = {
    "gpt-characters-float16": ("gpt", "characters", "float16"),
    "modern-bpe-float16": ("modern", "bpe", "float16"),
    "modern-characters-int8": ("modern", "characters", "int8"),
    "gpt-bpe-int8": ("gpt", "bpe", "int8"),
    "gpt-bytes-int8": ("gpt", "bytes", "int8"),
}


@pytest.fixture(scope="session")
def exported(browser, make_model, byte_pairs, tmp_path_factory):
    """exported(kind) -> Exported, the same one each time."""
    made = {}
    tokenizers = {"characters": CharTokenizer(CHARS), "bpe": byte_pairs, "bytes": ByteTokenizer()}

    def get(kind):
        if kind not in made:
            arch, letters, how = KINDS[kind]
            tokenizer = tokenizers[letters]
            sizes = dict(n_embd=24) if letters == "bytes" else {}  # which SIMD's sixteen do not divide
            model = random_model(make_model, arch, tokenizer.vocab_size, **sizes)
            made[kind] = Exported(browser, tmp_path_factory.mktemp(kind), model, tokenizer, how, "The miller")
        return made[kind]

    return get


@pytest.fixture(params=sorted(KINDS))
def each(request, exported):
    return exported(request.param)


@pytest.fixture
def page(exported):
    """The page of characters, as it is after opening."""
    page = exported("gpt-characters-float16").page
    page.ask("Page.bringToFront")
    page.evaluate("(pause(), state.history = [], state.chosen = null, cancelEditor(), setText('The miller', false))")
    page.evaluate(
        """for (const [id, value] of [["temperature", 0.8], ["top-k", TOP_KS.length - 1], ["top-p", 1], ["speed", 3]])
             byId(id).value = value;
           drawSettings(); look()"""
    )
    settle(page)
    return page


def settle(page):
    page.wait("!looking && !state.run && questions.size === 0")


def text_of(page):
    return page.evaluate("state.tokens.map(({ piece }) => piece).join('')")


def shown(page):
    """The text as a person sees it."""
    return page.evaluate("[...document.querySelectorAll('#text .token:not(.next)')].map(e => e.textContent).join('')")


# ---------------------------------------------------------------------------------------------------------------------
# The same numbers as Python


@pytest.mark.parametrize("arithmetic", ["simd", "plain"])
def test_logits_are_pythons(each, arithmetic):
    each.page.evaluate(f"(byId('arithmetic').value = '{arithmetic}', load())")
    assert each.page.evaluate("byId('arithmetic').value") == arithmetic
    idx = torch.randint(each.tokenizer.vocab_size, (1, 32), generator=torch.Generator().manual_seed(1))
    logits = each.numbers("logits", "logits", tokens=idx[0].tolist()).view(32, -1)
    with torch.no_grad():
        ours, _ = each.rounded(idx, idx)
        unrounded, _ = each.model(idx, idx)
    assert (logits - ours[0]).abs().max() < 1e-4
    if each.how == "float16":
        assert (logits - unrounded[0]).abs().max() <= 2e-2
    assert ours.std() > 0.5  # there is something to get wrong
    assert each.page.evaluate("byId('differs').hidden"), "the page sees that by itself"


class OtherBend(MLP):
    """What someone tries in model.py, and not in page/model.js."""

    def forward(self, x):
        return self.c_proj(F.relu(self.c_fc(x)))


def test_a_page_whose_model_was_changed_says_that_it_computes_another(browser, make_model, tmp_path):
    model = random_model(make_model, "gpt", len(CHARS))
    model.transformer.h[1].mlp.__class__ = OtherBend
    each = Exported(browser, tmp_path, model, CharTokenizer(CHARS), "float16", "The")
    assert each.page.evaluate("!byId('differs').hidden") and "page/model.js" in each.page.text("#differs")
    each.page.close()


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda m: m.register_parameter("spare", torch.nn.Parameter(torch.ones(1))), "has spare, and .* without it"),
        (lambda m: delattr(m.transformer.h[1].mlp, "c_fc"), "has no transformer.h.1.mlp.c_fc.bias, and .* with it"),
        (lambda m: delattr(m.transformer, "wpe"), "has no transformer.wpe.weight, and .* with it"),
        (lambda m: setattr(m, "lm_head", copy.deepcopy(m.lm_head)), "has lm_head.weight, and"),
    ],
)
def test_a_model_with_other_weights_than_the_page_computes_with_is_refused(make_model, change, words):
    model = random_model(make_model, "gpt", len(CHARS))
    export.page_tensors(model)
    export.page_tensors(Modern(ModernConfig(block_size=8, n_layer=1, n_head=1, n_embd=8, ahead=3)))  # none of the page
    change(model)
    with pytest.raises(UserError, match=words):
        export.page_tensors(model)


def test_the_same_greedy_text_for_200_tokens_far_past_the_window(each):
    start = each.tokenizer.encode("The miller")
    tokens = start.tolist()
    written = each.answer("write", tokens=tokens, count=200, ms=60_000, settings={"temperature": 0})["written"]
    expected = [int(t) for t in generate.generate(each.rounded, start[None], 200, temperature=0)]
    assert [token["id"] for token in written] == expected
    if each.how == "float16":  # the weights as they were trained write the same too
        assert [int(t) for t in generate.generate(each.model, start[None], 200, temperature=0)] == expected
    # and each token's surprise, and the window it was seen from
    text, reader = start[None], generate.Reader(each.rounded)
    for token in written[:80]:
        with torch.inference_mode():
            log_p = F.log_softmax(reader.next_logits(text), dim=-1)[0, token["id"]]
        assert token["bits"] == pytest.approx(-float(log_p) / math.log(2), abs=1e-3)
        assert token["start"] == reader.start
        text = torch.cat([text, torch.tensor([[token["id"]]])], dim=1)


TEXTS = [
    "",
    "The miller",
    "It's 12 o'clock;  the\n\n\tmill -- isn't 34567!  ",
    "naïve café — 東京 🙂🙂 ßü",
    "   ",
    "x\r\ny",
]
TEXTS += [
    "a\u00a0b\u2003c\u0085d\ufeffe",
    "a<|endoftext|>b<|endoftext|>",
    "<img src=x onerror=window.ran=1> ",
    "'LL we'll 'tis",
]


def test_tokens_are_pythons(each):
    for text in TEXTS:
        if isinstance(each.tokenizer, CharTokenizer) and set(text) - set(CHARS):
            continue
        ids = each.page.evaluate(f"tokenizer.encode({json.dumps(text)})")
        assert ids == each.tokenizer.encode(text).tolist(), text
        assert each.page.evaluate(f"tokenizer.pieces({ids}).join('')") == each.tokenizer.decode(ids) == text


def test_any_tokens_give_pythons_text(exported):
    each = exported("modern-bpe-float16")
    dice = torch.Generator().manual_seed(3)
    for _ in range(20):  # halves of characters, and bytes that are none
        ids = torch.randint(256, (12,), generator=dice).tolist()
        assert each.page.evaluate(f"tokenizer.pieces({ids}).join('')") == each.tokenizer.decode(ids)


@pytest.mark.parametrize("temperature", [0, 0.5, 1, 1.7])
@pytest.mark.parametrize("top_k, top_p", [(0, 1), (3, 1), (0, 0.6), (5, 0.7), (40, 0.05), (1000, 0.999)])
def test_the_distribution_is_next_token_probs(exported, temperature, top_k, top_p):
    logits = 2 * torch.randn(60, generator=torch.Generator().manual_seed(5))
    settings = {"temperature": temperature, "topK": top_k, "topP": top_p}
    page = exported("gpt-characters-float16").page
    probs = page.evaluate(f"[...nextTokenProbs({logits.tolist()}, {json.dumps(settings)})]")
    expected = generate.next_token_probs(logits, temperature, top_k, top_p)
    torch.testing.assert_close(torch.tensor(probs, dtype=torch.float32), expected, atol=1e-6, rtol=1e-4)


def test_draws_are_as_frequent_as_they_are_probable(exported):
    page = exported("gpt-characters-float16").page
    counts = page.evaluate(
        "Array.from({length: 20000}, () => pick([0.5, 0, 0.3, 0.2])).reduce((n, i) => (n[i]++, n), [0, 0, 0, 0])"
    )
    assert counts[1] == 0 and sum(counts) == 20000
    for count, p in zip(counts, [0.5, 0, 0.3, 0.2]):
        assert abs(count / 20000 - p) < 0.02
    assert page.evaluate("[pick([0.5, 0.5], () => 0.4999), pick([0.5, 0.5], () => 0.5), pick([0, 1], () => 0)]") == [
        0,
        1,
        1,
    ]


def test_beams_are_pythons(each):
    start = each.tokenizer.encode("The miller and the fer")[None]
    found = each.answer("beams", tokens=start[0].tolist(), length=14, width=3)["beams"]  # past the window of characters
    expected = generate.beam_search(each.rounded, start, 14, 3, length_penalty=0)
    assert [beam["tokens"] for beam in found] == [h.tokens for h in expected]
    assert [beam["logProb"] for beam in found] == pytest.approx([h.score for h in expected], abs=1e-3)


def attention_weights(model, idx):
    """What each head of each layer looks at, from queries and keys caught on their way into model.attention."""
    import model as gpt
    import modern

    caught, original = [], gpt.attention

    def catch(q, k, v, *rest):
        T = q.size(2)
        scores = q @ k.transpose(2, 3) / math.sqrt(q.size(3)) + torch.full((T, T), float("-inf")).triu(1)
        caught.append(scores.softmax(dim=-1)[0])
        return original(q, k, v, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpt, "attention", catch)
        patch.setattr(modern, "attention", catch)
        with torch.no_grad():
            model(idx)
    return torch.stack(caught)  # (layers, H, T, T)


@pytest.mark.parametrize("kind", ["gpt-characters-float16", "modern-bpe-float16"])
def test_attention_and_heads_are_what_python_computes(exported, kind):
    each = exported(kind)
    idx = each.tokenizer.encode("The miller and the ferryman")[None]
    T, H = idx.size(1), each.model.config.n_head
    expected = attention_weights(each.rounded, idx)
    tokens = [*idx[0].tolist(), 1]
    for position in (1, 5, T):
        found = each.page.evaluate(
            f"""ask('inspect', {{tokens: {tokens}, position: {position}, start: 0, most: 3}})
                .then(answer => answer.attention.map(weights => [...weights]))"""
        )
        found = torch.tensor(found, dtype=torch.float32).view(-1, H, position)
        torch.testing.assert_close(found, expected[:, :, position - 1, :position], atol=1e-4, rtol=1e-3)
    maps = each.page.evaluate(
        f"""ask('heads', {{tokens: {tokens}, position: {T}, start: 0}})
            .then(answer => answer.maps.map(row => row.map(map => [...map])))"""
    )
    torch.testing.assert_close(torch.tensor(maps).view(-1, H, T, T), expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["gpt-characters-float16", "modern-bpe-float16"])
def test_the_lens_reads_each_layer_with_the_models_own_head(exported, kind):
    each = exported(kind)
    idx = each.tokenizer.encode("The miller")[None]
    streams, model = [], each.rounded
    blocks = model.transformer.h if isinstance(model, GPT) else model.layers
    hooks = [blocks[0].register_forward_pre_hook(lambda _, inputs: streams.append(inputs[0]))]
    hooks += [block.register_forward_hook(lambda _, inputs, x: streams.append(x)) for block in blocks]
    with torch.no_grad():
        final, _ = model(idx)
        for hook in hooks:
            hook.remove()
        found = each.answer("inspect", tokens=idx[0].tolist(), position=idx.size(1), start=None, most=4)["lens"]
        assert len(found) == len(streams) == model.config.n_layer + 1
        for guesses, x in zip(found, streams):
            x = x[:, -1]
            if isinstance(model, GPT):
                logits = model.lm_head(model.transformer.ln_f(x))
            else:
                logits = 15 * torch.tanh(model.lm_head(F.layer_norm(x, x.shape[-1:])) / 15)
            probs, ids = logits.softmax(dim=-1)[0].topk(4)
            assert [guess["id"] for guess in guesses] == ids.tolist()
            assert [guess["probability"] for guess in guesses] == pytest.approx(probs.tolist(), abs=1e-4)
    assert found[-1][0]["id"] == int(final[0, -1].argmax())


def test_a_place_that_left_the_window_is_seen_as_it_was(exported):
    each = exported("gpt-characters-float16")
    start = each.tokenizer.encode("The miller")
    tokens = start.tolist()
    written = each.answer("write", tokens=tokens, count=100, ms=60_000, settings={"temperature": 1})["written"]
    tokens += [token["id"] for token in written]
    for place in (12, 40, 80, 105):
        token = written[place - len(start)]
        logits = each.numbers("inspect", "logits", tokens=tokens, position=place, start=token["start"], most=1)
        bits = -float(logits.log_softmax(0)[tokens[place]]) / math.log(2)
        assert bits == pytest.approx(token["bits"], abs=1e-3)


def test_every_token_of_a_long_text_is_seen_from_half_a_window_or_more(exported):
    each = exported("gpt-characters-float16")
    text = each.tokenizer.encode(
        "The miller had never seen the ferryman's goat, and the goat had never seen a mill. " * 2
    )
    found = each.answer("read", tokens=text.tolist(), **{"from": 0})["found"]
    assert sorted(token["position"] for token in found) == list(range(1, len(text)))
    for token in found:
        position, start = token["position"], token["start"]
        assert start < position <= start + 32 and position - start >= min(position, 16)
        with torch.no_grad():
            logits, _ = each.rounded(text[None, start:position])
        bits = -float(logits[0, -1].log_softmax(0)[text[position]]) / math.log(2)
        assert token["bits"] == pytest.approx(bits, abs=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Each control does what it says


def test_step_run_pause_and_undo(page):
    page.click("#step")
    page.wait("state.tokens.length === 11")
    page.click("#step")
    page.wait("state.tokens.length === 12")
    settle(page)
    two_more = text_of(page)
    assert two_more.startswith("The miller") and shown(page) == two_more
    page.focus("#speed")
    page.press("End")
    assert page.text("#speed-value") == "as fast as it can"
    page.click("#run")
    assert page.text("#run") == "Pause" and page.evaluate("byId('step').disabled")
    page.wait("state.tokens.length > 150")
    page.click("#run")
    settle(page)
    length = page.evaluate("state.tokens.length")
    assert page.text("#run") == "Run" and re.search(r"^\d+ tokens in [\d.]+ s, \d+ a second", page.text("#status"))
    time.sleep(0.2)
    assert page.evaluate("state.tokens.length") == length  # paused is paused
    faded = page.evaluate("drawn.map(({ element }) => element.classList.contains('left-behind'))")
    start = page.evaluate("state.windowStart")
    assert faded == [True] * start + [False] * (length - start) and length - 32 <= start > 0  # past the window
    page.click("#undo")  # the whole run, then a step each
    settle(page)
    assert text_of(page) == two_more and page.evaluate("document.querySelectorAll('#text .left-behind').length") == 0
    page.click("#undo")
    page.click("#undo")
    settle(page)
    assert text_of(page) == "The miller" and page.evaluate("byId('undo').disabled")


def test_the_speed_is_the_one_that_is_set(page):
    page.focus("#speed")
    page.press("Home")
    assert page.text("#speed-value") == "1 a second"
    page.press("ArrowRight", 2)
    assert page.text("#speed-value") == "4 a second"
    page.click("#run")
    time.sleep(1.2)
    page.click("#run")
    settle(page)
    assert 2 <= page.evaluate("state.tokens.length") - 10 <= 6  # none of them at once


def test_the_text_is_coloured_by_surprise(page):
    each = page.evaluate("state.tokens.map(({ bits }) => bits)")
    shades = page.evaluate("drawn.map(({ element }) => Number(element.dataset.shade ?? -1))")
    assert each[0] is None and shades[0] == -1  # nothing came before it
    assert shades[1:] == [min(7, int(bits)) for bits in each[1:]] and len(set(shades)) > 2
    assert page.evaluate("byId('legend-colours').textContent") == "01234567+"
    colours = page.evaluate("[...byId('legend-colours').children].map(i => getComputedStyle(i).backgroundColor)")
    assert len(set(colours)) == 8


def test_a_click_on_a_token_shows_its_moment(page, exported):
    each = exported("gpt-characters-float16")
    page.click("#token-5")
    settle(page)
    assert page.evaluate("text.getAttribute('aria-activedescendant')") == "token-5"
    with torch.no_grad():
        logits, _ = each.rounded(each.tokenizer.encode("The m")[None])
    probs, ids = logits[0, -1].softmax(0).topk(5)
    rows = page.evaluate("bars.map(row => row.token)")
    assert rows[:5] == ids.tolist()
    moment = page.text("#moment")
    p = float(logits[0, -1].softmax(0)[each.tokenizer.encode("i")])
    assert "The m" in moment and f"{-math.log2(p):.1f} bit" in moment
    assert page.evaluate("bars.filter(row => row.className.includes('drawn')).map(row => label(row.token))") == ["i"]
    width = page.evaluate("Number(bars[1].querySelector('.outline').style.getPropertyValue('--share'))")
    top = page.evaluate("Number(bars[0].querySelector('.outline').style.getPropertyValue('--share'))")
    assert width / top == pytest.approx(float(probs[1] / probs[0]), rel=1e-3)
    page.click("#token-0")
    settle(page)
    assert "nothing predicted it" in page.text("#moment") and page.evaluate("byId('bars').className.includes('empty')")


def test_sliders_reshape_the_distribution_at_once(page):
    def filled():
        return page.evaluate("bars.map(row => Number(row.querySelector('.filled').style.getPropertyValue('--share')))")

    def outlined():
        return page.evaluate("bars.map(row => Number(row.querySelector('.outline').style.getPropertyValue('--share')))")

    page.focus("#temperature")
    page.press("Home")
    assert page.text("#temperature-value") == "0: the likeliest"
    assert filled()[0] > 0 and filled()[1:] == [0] * 11
    page.press("ArrowRight", 20)
    assert page.text("#temperature-value") == "1.00" and filled() == pytest.approx(outlined())
    sharp, wild = [], []
    page.press("ArrowLeft", 10)
    sharp = filled()
    page.press("End")
    wild = filled()
    assert page.text("#temperature-value") == "2.00" and sharp[0] / sharp[5] > wild[0] / wild[5]
    page.focus("#top-k")
    assert page.text("#top-k-value") == "all"
    page.press("Home")
    page.press("ArrowRight", 2)
    assert page.text("#top-k-value") == "3"
    assert [share > 0 for share in filled()] == [True] * 3 + [False] * 9
    assert page.evaluate("bars.map(row => row.className.includes('cut'))") == [False] * 3 + [True] * 9
    page.press("End")
    page.focus("#top-p")
    page.press("Home")
    assert page.text("#top-p-value") == "0.05" and sum(share > 0 for share in filled()) < 12
    assert not page.evaluate("looking")  # the model was not asked for any of it


def test_the_settings_are_those_that_text_is_drawn_with(page, exported):
    each = exported("gpt-characters-float16")
    page.focus("#temperature")
    page.press("Home")
    for _ in range(5):
        page.click("#step")
        settle(page)
    expected = generate.generate(each.rounded, each.tokenizer.encode("The miller")[None], 5, temperature=0)
    assert text_of(page) == "The miller" + each.tokenizer.decode([int(t) for t in expected])


def test_a_candidate_is_taken_in_the_middle_and_the_text_goes_on_from_there(page):
    page.click("#token-4")
    settle(page)
    letter = page.evaluate("label(bars[2].token)").replace("␣", " ").replace("↵", "\n")
    page.click("#bars li:nth-child(3) button")
    settle(page)
    assert text_of(page) == "The " + letter
    assert page.evaluate("state.tokens[4].bits") > 0
    page.click("#step")
    page.wait("state.tokens.length === 6")
    settle(page)
    page.click("#undo")
    page.click("#undo")
    settle(page)
    assert text_of(page) == "The miller"


def test_the_text_is_edited_in_the_middle(page, exported):
    each = exported("gpt-characters-float16")
    page.click("#token-4")
    settle(page)
    page.click("#edit")
    assert page.evaluate("[byId('prompt').value, document.activeElement.id]") == ["The miller", "prompt"]
    page.type("old ")  # the caret stands where the chosen token was
    page.press("Enter", ctrl=True)
    page.wait("byId('editor').hidden")
    settle(page)
    assert text_of(page) == shown(page) == "The old miller"
    with torch.no_grad():
        idx = each.tokenizer.encode("The old miller")[None]
        logits, _ = each.rounded(idx, idx)
    expected = -logits[0, :-1].log_softmax(-1).gather(-1, idx[0, 1:, None])[:, 0] / math.log(2)
    found = page.evaluate("state.tokens.slice(1).map(({ bits }) => bits)")
    assert found == pytest.approx(expected.tolist(), abs=1e-3)
    page.click("#step")
    page.wait("state.tokens.length === 15")
    settle(page)
    page.click("#undo")
    page.click("#undo")
    settle(page)
    assert text_of(page) == "The miller"
    page.click("#edit")
    page.type("nothing of this")
    page.press("Escape")
    assert text_of(page) == "The miller" and page.evaluate("byId('editor').hidden")


def test_characters_that_the_model_does_not_know_are_named(page):
    page.click("#edit")
    page.type("5 ¥")
    page.click("#done")
    page.wait("!byId('alert').hidden")
    assert "5 (U+0035)" in page.text("#alert") and "¥ (U+00A5)" in page.text("#alert")
    assert text_of(page) == "The miller" and page.evaluate("byId('prompt').value") == "The miller5 ¥"  # nothing is lost
    page.click("#cancel")
    assert page.evaluate("byId('alert').hidden")


def test_an_empty_text_begins_after_a_line_break(page):
    page.click("#edit")
    page.evaluate("byId('prompt').select()")
    page.type("")
    page.evaluate("byId('prompt').value = ''")
    page.click("#done")
    page.wait("byId('editor').hidden")
    settle(page)
    assert text_of(page) == "\n"
    page.click("#step")
    page.wait("state.tokens.length === 2")


def test_attention_is_drawn_over_the_text(page, exported):
    each = exported("gpt-characters-float16")
    expected = attention_weights(each.rounded, each.tokenizer.encode("The miller")[None])[:, :, -1]  # (layers, H, T)

    def check(layer, head):
        weights = expected[layer, head]
        page.wait(f"state.head.layer === {layer} && state.head.head === {head}")
        settle(page)  # the panels are asked for again when the maps come into view
        shades = page.evaluate("[...byId('looks').children].map(e => Number(e.style.getPropertyValue('--shade')))")
        assert shades == pytest.approx(((weights / weights.max()) ** 0.6).tolist(), abs=2e-3)
        assert page.evaluate("[byId('layer').value, byId('head').value]") == [str(layer), str(head)]
        pressed = page.evaluate("maps.flat().map(b => b.getAttribute('aria-pressed') === 'true').indexOf(true)")
        assert pressed == 2 * layer + head

    page.choose("#layer", "1")
    page.choose("#head", "0")
    check(1, 0)
    page.click("#next-head")
    check(1, 1)
    page.click("#next-head")
    check(2, 0)
    page.click("#maps button", nth=1)
    check(0, 1)
    page.press("ArrowDown")
    check(1, 1)
    page.press("ArrowLeft")
    check(1, 0)
    page.press("ArrowUp", 2)
    check(2, 0)
    assert page.text("#looks").replace("↵", "") == "The miller"


def test_every_head_has_its_picture(page, exported):
    each = exported("gpt-characters-float16")
    page.click("#maps button", nth=0)
    page.wait("headsInView")
    page.evaluate("look()")
    settle(page)
    expected = attention_weights(each.rounded, each.tokenizer.encode("The miller")[None])
    assert page.evaluate("document.querySelectorAll('#maps canvas').length") == 6
    for layer in range(3):
        pixels = page.evaluate(
            f"(c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data])(maps[{layer}][1].firstChild)"
        )
        alpha = torch.tensor(pixels).view(10, 10, 4)[:, :, 3] / 255
        torch.testing.assert_close(alpha**2, expected[layer, 1], atol=0.02, rtol=0)


def test_the_lens_is_a_table_by_layer(page):
    rows = page.evaluate(
        "[...document.querySelectorAll('#lens-body tr')].map(row => [...row.children].map(c => c.innerText))"
    )
    assert [row[0] for row in rows] == ["before layer 1", "layer 1", "layer 2", "layer 3: the answer"]
    lens = page.evaluate("state.moment.lens.map(row => row.map(({ id }) => label(id)))")
    assert [[cell.split()[0] for cell in row[1:]] for row in rows] == lens
    assert page.evaluate("document.querySelector('#lens-body tr:last-child td').className") == "answer"


def test_beam_search_grows_a_tree_and_its_texts_can_be_taken(page, exported):
    each = exported("gpt-characters-float16")
    page.evaluate("(byId('beam-width').value = 2, byId('beam-length').value = 5)")
    page.click("#beam-search")
    page.wait("byId('tree').querySelector('svg') !== null && !byId('beam-search').disabled")
    expected = generate.beam_search(each.rounded, each.tokenizer.encode("The miller")[None], 5, 2)
    best = [each.tokenizer.decode(h.tokens) for h in expected]
    visible = [text.replace(" ", "␣").replace("\n", "↵") for text in best]
    listed = page.evaluate("[...document.querySelectorAll('#beam-list b')].map(e => e.textContent)")
    assert listed == visible
    nodes = page.evaluate("[...document.querySelectorAll('#tree g')].map(g => g.getAttribute('class'))")
    assert (nodes.count("root"), nodes.count("best"), nodes.count("kept")) == (1, 5, 5)
    path = page.evaluate("[...document.querySelectorAll('#tree g.best > text')].map(t => t.firstChild.data).join('')")
    assert path == visible[0]
    page.click("#beam-list button", nth=1)
    page.wait("state.tokens.length === 15")
    settle(page)
    assert text_of(page) == "The miller" + best[1] and page.evaluate(
        "state.tokens.every(({ bits }, i) => i === 0 || bits >= 0)"
    )
    page.click("#undo")
    settle(page)
    assert text_of(page) == "The miller"


@pytest.mark.parametrize("kind", ["gpt-characters-float16", "modern-bpe-float16"])
def test_no_text_of_the_tree_runs_into_another(exported, kind):
    page = exported(kind).page
    page.ask("Page.bringToFront")
    page.evaluate("(byId('beam-width').value = 6, byId('beam-length').value = 12, true)")
    page.click("#beam-search")
    page.wait("byId('tree').querySelectorAll('g.best').length === 12 && !byId('beam-search').disabled")
    boxes = page.evaluate(
        """[...byId('tree').querySelectorAll('text')].map(text => {
            const {x, y, width, height} = text.getBBox();
            return [x, y, x + width, y + height];
        })"""
    )
    width, height = page.evaluate("['width', 'height'].map(side => Number(byId('tree').firstChild.getAttribute(side)))")
    assert len(boxes) > 100
    for i, (left, top, right, bottom) in enumerate(boxes):
        assert left >= 0 and top >= 0 and right <= width and bottom <= height
        for other_left, other_top, other_right, other_bottom in boxes[:i]:
            beside = left >= other_right or right <= other_left
            assert beside or top >= other_bottom - 3 or bottom <= other_top + 3


def test_both_arithmetics_can_be_chosen_and_measured(page):
    for name in ("plain", "simd"):
        page.choose("#arithmetic", name)
        page.wait("byId('measured').textContent.startsWith('unpacked')")
        page.click("#measure")
        page.wait("byId('measured').textContent.endsWith('tokens a second')")
        settle(page)
        assert page.evaluate("byId('arithmetic').value") == name and text_of(page) == "The miller"


@pytest.mark.parametrize("kind", ["gpt-bytes-int8", "modern-bpe-float16"])
def test_characters_of_several_tokens_are_shown_whole(exported, kind):
    each = exported(kind)
    page, words = each.page, "naïve 🙂 東京!"
    page.ask("Page.bringToFront")
    page.evaluate(f"setText({json.dumps(words)}, false)")
    settle(page)
    assert text_of(page) == shown(page) == words
    ids = each.tokenizer.encode(words).tolist()
    assert page.evaluate("state.tokens.map(({ id }) => id)") == ids
    parts = page.evaluate("drawn.flatMap(({ element }, i) => element.className.includes('part') ? [i] : [])")
    assert len(parts) == len(ids) - len([i for i in range(len(ids)) if page.evaluate(f"state.tokens[{i}].piece")]) > 0
    lefts = page.evaluate(
        "bars.filter(row => !row.hidden).map(row => row.querySelector('.bar').getBoundingClientRect().x)"
    )
    assert len(lefts) == 12 and len(set(lefts)) == 1  # however long the names are
    page.click(f"#token-{parts[1]}")  # a part can be looked at too, and says which byte it is
    settle(page)
    assert page.evaluate("state.chosen") == parts[1] and "\u2039" in page.text("#moment")
    page.click("#edit")
    assert page.evaluate("byId('prompt').value") == words
    page.press("End", ctrl=True)
    page.type(" 🙂")
    page.click("#done")
    page.wait("byId('editor').hidden")
    settle(page)
    assert shown(page) == words + " 🙂"
    page.evaluate("(state.history = [], state.chosen = null, setText('The miller', false))")
    settle(page)


# ---------------------------------------------------------------------------------------------------------------------
# For everybody


def test_everything_is_reached_and_done_with_the_keyboard(page):
    page.evaluate("(document.activeElement.blur(), scrollTo(0, 0))")
    reached = []
    for _ in range(60):
        page.press("Tab")
        reached.append(page.evaluate("document.activeElement.closest('[id]')?.id"))
    wanted = "text run step edit speed temperature top-k top-p bars layer head next-head maps beam-width beam-length"
    assert [name for name in f"{wanted} beam-search arithmetic measure".split() if name not in reached] == []
    page.focus("#text")
    page.press("End")
    page.press("ArrowLeft", 2)
    settle(page)
    assert page.evaluate("state.chosen") == 8
    page.press("Home")
    page.press("ArrowRight")
    settle(page)
    assert page.evaluate("[state.chosen, state.moment.position]") == [1, 1]
    page.press("End")
    page.focus("#step")
    page.press("Enter")
    page.wait("state.tokens.length === 11")
    settle(page)
    page.focus("#undo")
    page.press(" ")
    settle(page)
    assert text_of(page) == "The miller"
    page.focus("#bars button")
    page.press("Enter")
    settle(page)
    assert page.evaluate("state.tokens.length") == 11 and page.evaluate("document.activeElement === bars[0].button")


def test_keys_in_the_text_write_and_take_back(page):
    page.focus("#text")
    page.press("Enter")
    page.wait("state.tokens.length === 11")
    settle(page)
    page.press(" ")
    page.wait("state.tokens.length > 12")
    assert page.text("#run") == "Pause"
    page.press(" ")
    settle(page)
    page.press("Backspace", 2)
    settle(page)
    assert text_of(page) == "The miller"
    page.press("e")
    assert page.evaluate("[byId('prompt').value, document.activeElement.id]") == ["The miller", "prompt"]
    page.press("Escape")


def test_everything_has_a_name_for_those_who_listen(page):
    page.ask("Accessibility.enable")
    nodes = page.ask("Accessibility.getFullAXTree")["nodes"]
    roles = [
        "button",
        "combobox",
        "slider",
        "spinbutton",
        "textbox",
        "listbox",
        "option",
        "region",
        "img",
        "heading",
        "table",
    ]
    named = 0
    for node in nodes:
        role = node.get("role", {}).get("value")
        if role in roles and not node.get("ignored"):
            named += 1
            assert node.get("name", {}).get("value"), node
    assert named > 50
    said = page.evaluate(
        "[byId('moment').getAttribute('aria-live'), byId('status').getAttribute('role'), document.documentElement.lang]"
    )
    assert said == ["polite", "status", "en"]


def luminance(colour):
    """Of "rgb(1, 2, 3)", as the Web Content Accessibility Guidelines have it."""
    parts = [int(n) / 255 for n in re.findall(r"\d+", colour)[:3]]
    parts = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def contrast(colour, other):
    """Of two such colours, from 1 to 21; text needs 4.5 to be read with ease."""
    lighter, darker = sorted([luminance(colour), luminance(other)], reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_text_reads_well_on_every_shade(page, dark):
    page.dark(dark)
    try:
        page.evaluate("byId('lens-body').querySelectorAll('td')[0].style.setProperty('--shade', 1)")
        page.evaluate("byId('looks').children[0].style.setProperty('--shade', 1)")
        ink, card = page.evaluate("[getComputedStyle(text).color, getComputedStyle(byId('writing')).backgroundColor]")
        colours = page.evaluate(
            """[...[...byId('legend-colours').children].slice(1), byId('lens-body').querySelector('td'),
                byId('looks').children[0]].map(element => getComputedStyle(element).backgroundColor)"""
        )
        assert len(colours) == 9 and all(contrast(ink, colour) >= 4.5 for colour in colours), colours
        small = page.evaluate("getComputedStyle(byId('lens-body').querySelector('td small')).color")
        assert contrast(small, colours[7]) >= 4.5
        steps = [contrast(card, colour) for colour in colours[:7]]  # each further from the paper than the one before
        assert steps == sorted(steps) and steps[0] > 1.05 and steps[-1] > 2.4
    finally:
        page.dark(False)
        page.evaluate("look()")
        settle(page)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_fits_a_phone_and_reads_well_in_light_and_dark(page, width, dark):
    try:
        page.resize(width, 844, phone=width < 500)
        page.dark(dark)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for selector in ("body", ".hint", ".words p", "#run", ".python summary", "#alert"):
            ink, paper = page.evaluate(
                f"""(() => {{
                    let element = document.querySelector({json.dumps(selector)});
                    const ink = getComputedStyle(element).color;
                    const paper = () => getComputedStyle(element).backgroundColor;
                    while (paper() === "rgba(0, 0, 0, 0)") element = element.parentElement;
                    return [ink, paper()];
                }})()"""
            )
            assert contrast(ink, paper) >= 4.5, (selector, ink, paper)
        assert (luminance(page.evaluate("getComputedStyle(document.body).backgroundColor")) < 0.1) == dark
    finally:
        page.resize(1280, 900)
        page.dark(False)


@pytest.mark.parametrize("kind", ["gpt-characters-float16", "modern-bpe-float16"])
def test_every_panel_explains_itself_and_shows_its_python(exported, kind):
    page = exported(kind).page
    panels = page.evaluate(
        """[...document.querySelectorAll("section")].map(section => [section.id,
            section.querySelector(".words p").textContent, section.querySelectorAll("details.python pre").length])"""
    )
    assert len(panels) == 7
    for name, words, python in panels:
        assert len(re.findall(r"[.?](?=\s|$)", words)) == 2 and python >= 1, (name, words)
    shown = page.evaluate(
        """[...document.querySelectorAll("details.python")].map(details => [
            details.querySelector("summary").textContent, details.querySelector("pre").textContent])"""
    )
    for summary, code in shown:
        file, name = re.match(r"In Python: (\w+\.py), (\w+)", summary).groups()
        assert (file == "modern.py") == (kind.startswith("modern") and name in ("CausalSelfAttention", "Block"))
        assert (
            code.strip() in (ROOT / file).read_text(encoding="utf-8")
            and name in code.splitlines()[0] + code.splitlines()[1]
        )


# ---------------------------------------------------------------------------------------------------------------------
# Text is data, and nothing leaves the page


def test_html_in_title_prompt_vocabulary_and_address_is_text(exported, browser, byte_pairs):
    each = exported("modern-bpe-float16")
    page = each.open(browser, hash="#<img src=x onerror=window.ran=1>")
    try:
        assert page.text("h1") == EVIL and page.evaluate("document.title") == EVIL
        page.click("#edit")
        page.evaluate("byId('prompt').select()")
        page.type(EVIL + "<img src=x onerror=window.ran=1>")
        page.click("#done")
        page.wait("byId('editor').hidden")
        settle(page)
        assert shown(page) == EVIL + "<img src=x onerror=window.ran=1>"
        page.evaluate("(byId('beam-length').value = 3, true)")
        page.click("#beam-search")
        page.wait("byId('tree').querySelector('svg') !== null && !byId('beam-search').disabled")
        page.press("Home")
        assert page.evaluate("typeof window.ran") == "undefined"
        assert page.evaluate("document.querySelectorAll('img, #text b, #looks b, #text script').length") == 0
        assert page.evaluate("label(tokenizer.encode('<img src=x onerror=window.ran=1>')[0])").startswith("<img")
        # and even a script that did get in would not run
        page.evaluate(
            "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.ran = 1'}))"
        )
        page.evaluate("document.body.insertAdjacentHTML('beforeend', '<i onclick=\"window.ran = 1\" id=bad>x</i>')")
        page.evaluate("(document.getElementById('bad').click(), document.getElementById('bad').remove())")
        assert page.evaluate("typeof window.ran") == "undefined"
        blocked = page.evaluate("fetch('https://example.com').then(() => 'asked', () => 'blocked')")
        assert blocked == "blocked" and not any("example.com" in url for url in page.requests)
    finally:
        page.close()


def test_the_prompt_of_a_page_is_data_too(browser, make_model, tmp_path):
    characters = CharTokenizer(sorted(set(EVIL + "{}policy")))
    prompt = EVIL + "{{policy}}"
    model = random_model(make_model, "gpt", characters.vocab_size, block_size=256)
    each = Exported(browser, tmp_path, model, characters, "float16", prompt)
    assert text_of(each.page) == shown(each.page) == prompt
    assert each.page.evaluate("typeof window.ran") == "undefined" and each.page.complaints == []
    each.page.close()


def test_nothing_was_asked_of_the_network_and_nothing_complained(exported):
    """Last of the tests with pages: over everything that was done with them."""
    for kind in KINDS:
        page = exported(kind).page
        assert page.complaints == [], kind
        assert page.requests and all(url.startswith(("file://", "blob:", "data:")) for url in page.requests), (
            page.requests
        )


# ---------------------------------------------------------------------------------------------------------------------
# The file


def test_the_file_needs_nothing_else(make_model):
    page = export.build_page(
        random_model(make_model, "gpt", len(CHARS)), {"kind": "characters", "tokens": CHARS}, "int8"
    )
    tags = re.sub(r"<(script|style|pre)\b[^>]*>.*?</\1>", "", page, flags=re.DOTALL)
    assert not re.search(r"\bsrc=|https?:|@import|url\(", tags)
    assert not re.search(
        r"""(import|importScripts|fetch|XMLHttpRequest|eval|innerHTML|insertAdjacentHTML)\s*[(=]""", page
    )
    for path in (ROOT / "page").iterdir():
        if path.suffix in (".js", ".css"):
            assert not re.search(r"</script|</style|<!--", path.read_text(encoding="utf-8")), path


def test_packed_is_what_rounded_computes_with(make_model):
    model = random_model(make_model, "modern", 13)
    for how in ("float16", "int8"):
        tensors, same = export.page_tensors(model), export.page_tensors(export.rounded(model, how))
        for name, tensor in tensors.items():
            data = export.packed(tensor, how)
            if tensor.dim() == 1:
                read = torch.frombuffer(bytearray(data), dtype=torch.float32)
            elif how == "float16":
                read = torch.frombuffer(bytearray(data), dtype=torch.float16).float().view_as(tensor)
            else:
                rows = tensor.size(0)
                scale = torch.frombuffer(bytearray(data[: 4 * rows]), dtype=torch.float32)
                whole = torch.frombuffer(bytearray(data[4 * rows :]), dtype=torch.int8).view_as(tensor)
                assert int(whole.abs().max()) == 127
                read = whole.float() * scale[:, None]
            assert torch.equal(read, same[name]), (name, how)
            limit = tensor.abs().amax(-1, keepdim=True) / 250 if how == "int8" else 1e-3 * tensor.abs() + 1e-6
            assert ((read - tensor).abs() <= limit).all()


def test_the_default_model_fits_in_16_mb_and_small_ones_stay_float16(make_model):
    options = export.ExportOptions()
    model = GPT(GPTConfig(block_size=256, vocab_size=65, n_layer=6, n_head=6, n_embd=384))
    assert export.choose_format(model, options) == "int8"
    page = export.build_page(model, {"kind": "characters", "tokens": CHARS}, "int8")
    assert len(page.encode()) <= 16e6
    assert len(page.encode()) == pytest.approx(export.page_bytes(model, "int8"), rel=0.1)
    small = random_model(make_model, "gpt", len(CHARS))
    assert export.choose_format(small, options) == "float16"
    huge = make_model(vocab_size=11)
    with torch.no_grad():
        huge.lm_head.weight[0, 0] = 1e5
    assert export.choose_format(huge, options) == "int8"  # float16 ends at 65504
    assert export.choose_format(small, export.ExportOptions(weights="int8")) == "int8"
    words = {"kind": "bytes", "tokens": 100_000 * ["\u4e16\u754c"]}  # six bytes for each letter, and three more a word
    assert export.page_bytes(small, "int8", words) - export.page_bytes(small, "int8") == pytest.approx(1.5e6, rel=0.01)
    with pytest.raises(utils.UserError, match="more than --max_mb 2"):
        export.choose_format(small, export.ExportOptions(max_mb=2), dict(words, tokens=2 * words["tokens"]))


@pytest.fixture
def run_directory(make_model, tmp_path):
    directory = tmp_path / "out"
    directory.mkdir()
    checkpoint.save_model(str(directory), random_model(make_model, "gpt", len(CHARS)), CharTokenizer(CHARS))
    return directory


def test_the_command_writes_the_page_and_says_so(command, run_directory, tmp_path):  # noqa: F811
    (run_directory / "metrics.jsonl").write_text(
        '{"step": 1, "tokens": 80, "val_loss": 2.5}\n{"step": 2, "tokens": 160, "val_loss": 1.25}\n'
        '{"step": 3, "tokens": 240, "val_loss": 1.5}\n{"st'
    )
    result = command(export, "--html", "page.html", "--title", "Mill & <Co>", "--prompt", "Hello")
    assert (result.status, result.err) == (0, "")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert re.fullmatch(r"page\.html: \d+\.\d MB, weights in float16\. Open it in a browser\.\n", result.out)
    assert "<title>Mill &amp; &lt;Co&gt;</title>" in page
    data = json.loads(re.search(r'id="model-data">(.*?)</script>', page).group(1))
    assert data["prompt"] == "Hello" and ["validation loss", "1.80 bits per token (1.250 nats)"] in data["facts"]
    assert ["trained for", "160 tokens in 2 steps"] in data["facts"], "as the weights were that are in the page"
    facts = dict(data["facts"])
    assert facts["weights"] == f"float16, {2 * int(facts['parameters'].replace(',', '')) / 1e6:.1f} MB"
    assert command(export, "--title", "\udcff", "--html", "odd.html").status == 0, "a name that is no UTF-8"
    assert "<title>?</title>" in (tmp_path / "odd.html").read_text(encoding="utf-8")
    before = contents(run_directory)
    assert_refused(command(export, "--html", run_directory / "model.safetensors"), "--html", "name a .html file")
    assert contents(run_directory) == before, "no mistake costs a file that is no page"
    assert command(export, "--weights", "int8").status == 0
    assert "in int8" in (run_directory / "model.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "args, words",
    [
        (["--out_dir", "nowhere"], ["nowhere", "python train.py"]),
        (["--out_dir", "empty"], ["empty", "holds no model yet", "python train.py"]),
        (["--html", "missing/page.html"], ["--html missing/page.html", "cannot be written", "directory that exists"]),
        (["--html", "empty"], ["--html empty", "cannot be written"]),
        (["--weights", "float64"], ["--weights", "float16, int8"]),
        (["--max_mb", "0"], ["--max_mb"]),
        (["--prompt", "5 ¥"], ["--prompt 5 ¥", "U+00A5"]),
        (["--htm", "x"], ["unknown flag --htm", "--html"]),
    ],
)
def test_mistakes_are_one_line_and_leave_everything_as_it_was(command, run_directory, tmp_path, args, words):  # noqa: F811
    (tmp_path / "empty").mkdir()
    before = contents(tmp_path)
    assert_refused(command(export, *args), *words)
    assert contents(tmp_path) == before


def test_a_model_too_large_names_its_size_and_what_shrinks_it(command, make_model, tmp_path):  # noqa: F811
    directory = tmp_path / "out"
    directory.mkdir()
    model = GPT(GPTConfig(block_size=64, vocab_size=len(CHARS), n_layer=2, n_head=4, n_embd=128))
    checkpoint.save_model(str(directory), model, CharTokenizer(CHARS))
    result = command(export, "--weights", "float16", "--max_mb", "1")
    assert_refused(result, "--weights float16", "MB, more than --max_mb 1", "raise --max_mb")
    size = {how: export.page_bytes(model, how) / 1e6 for how in ("float16", "int8")}
    assert size["int8"] < 1.1 < size["float16"]
    options = export.ExportOptions(weights="float16", max_mb=1.1)
    with pytest.raises(utils.UserError, match=r"--weights int8 makes it 1 MB or raise --max_mb"):
        export.choose_format(model, options)
    assert export.choose_format(model, export.ExportOptions(max_mb=1.1)) == "int8"


def test_a_saved_tokenizer_is_the_one_in_the_page(byte_pairs, tmp_path):
    for tokenizer in (CharTokenizer(CHARS), ByteTokenizer(), byte_pairs):
        save_tokenizer(str(tmp_path), tokenizer, 32)
        assert export.tokenizer_spec(load_tokenizer(str(tmp_path)), "out") == export.tokenizer_spec(tokenizer, "out")


def test_a_tokenizer_that_the_page_cannot_run_is_refused(command, make_model, tmp_path):  # noqa: F811
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    directory = tmp_path / "out"
    directory.mkdir()
    checkpoint.save_model(str(directory), make_model(), LibraryTokenizer(words))
    assert_refused(command(export), "--out_dir out", "its tokenizer", "byte-level BPE")


def test_weights_that_are_no_numbers_are_refused(command, run_directory, make_model):  # noqa: F811
    model = random_model(make_model, "gpt", len(CHARS))
    with torch.no_grad():
        model.transformer.wpe.weight[0, 0] = math.nan
    checkpoint.save_model(str(run_directory), model, CharTokenizer(CHARS))
    assert_refused(command(export), "out: its weights hold infinities or NaN")


def test_a_page_half_written_never_takes_the_place_of_a_whole_one(command, run_directory, tmp_path, monkeypatch):  # noqa: F811
    (tmp_path / "page.html").write_text("the old one")

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert_refused(command(export, "--html", "page.html"), "No space left")
    assert (tmp_path / "page.html").read_text() == "the old one" and not (tmp_path / "page.html.tmp").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Its measurement


def test_bench_page_prints_every_figure(command, run_directory, browser, monkeypatch):  # noqa: F811
    import bench
    import bench_page

    monkeypatch.setattr(bench_page, "NEW_TOKENS", 80)
    result = command(bench, "page", "--out_dir", "out", "--rounds", 1, "--json", "figures.json")
    assert result.status == 0, result.err
    for title in bench_page.FIGURES.values():
        assert re.search(re.escape(title) + r" +[\d,]+\.\d\d ", result.out), title
    [found] = json.loads(Path("figures.json").read_text())["rounds"]
    assert set(found) == set(bench_page.FIGURES) and min(found.values()) > 0


def test_the_readmes_pictures_can_be_drawn_anew(command, run_directory, browser, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import pictures

    monkeypatch.setattr(pictures, "HERE", tmp_path)
    monkeypatch.setattr(pictures, "NEW_TOKENS", 120)
    (run_directory / "metrics.jsonl").write_text('{"step": 1, "tokens": 8, "train_loss": 2.5, "val_loss": 2.5}\n')
    assert command(pictures).status == 0
    for name in ("page-light.webp", "page-dark.webp", "loss.png", "lens.png"):
        signature = (tmp_path / name).read_bytes()[:12]
        assert signature[8:] == b"WEBP" if name.endswith("webp") else signature.startswith(b"\x89PNG"), name
        assert (ROOT / "docs" / name).stat().st_size < 200_000


@pytest.mark.parametrize("data, name", [("texts/", "texts"), ("my, tales.txt", "my, tales.txt"), ("a/b.txt", "b.txt")])
def test_the_page_names_the_text_it_was_trained_on(make_model, monkeypatch, tmp_path, data, name):
    state = dict(options=dict(data=data))
    monkeypatch.setattr(export, "load_state", lambda out_dir: state)
    facts = export.training_facts(str(tmp_path))
    assert facts == [("trained on", name)]
    page = export.build_page(
        random_model(make_model, "gpt", 3), {"kind": "characters", "tokens": "abc"}, "int8", "", None, facts
    )
    assert f"layers, trained on {name}." in page
