"""tokenizer.py: every text comes back as it was, from every kind of tokenizer, on disk and off."""

import json

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenizer as module
from sample import TextWriter
from tokenizer import (
    ByteTokenizer,
    CharTokenizer,
    LibraryTokenizer,
    byte_letters,
    check_name,
    load_tokenizer,
    make_tokenizer,
    prompt_tokens,
    save_tokenizer,
    tokenizer_hash,
    train_bpe,
)
from utils import UserError

TEXT = 'The "miller" said:\n\n  "Dry."\tÄpfel & Öl, naïve café — 3 € … 東京 🙂\r\n'


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizing by characters


@given(st.text(min_size=1))
def test_any_text_comes_back_from_its_characters(text):
    tokenizer = CharTokenizer.from_text(text)
    ids = tokenizer.encode(text)
    assert ids.dtype == torch.int64 and ids.shape == (len(text),)
    assert tokenizer.decode(ids) == tokenizer.decode(ids.tolist()) == text


@given(st.text(min_size=1))
def test_the_vocabulary_is_exactly_the_characters_of_the_text(text):
    tokenizer = CharTokenizer.from_text(text)
    assert tokenizer.chars == sorted(set(text)) and tokenizer.vocab_size == len(set(text))


def test_an_empty_text_is_no_tokens():
    assert CharTokenizer("ab").encode("").shape == (0,)
    assert CharTokenizer("ab").decode([]) == ""


@pytest.mark.parametrize("strange", ["\0", "A", "c", "z", "é", "🙂", "\udc80"])
def test_an_unknown_character_is_named(strange):
    with pytest.raises(UserError) as refused:
        CharTokenizer("aby").encode(f"a{strange}b")
    assert f"{strange!r} (U+{ord(strange):04X})" in str(refused.value) and "'a'" not in str(refused.value)


def test_many_unknown_characters_are_not_all_named():
    with pytest.raises(UserError, match=r"\(U\+0034\) \.\.\.") as refused:
        CharTokenizer("ab").encode("a0123456789")
    assert "U+0035" not in str(refused.value)


@given(st.text(min_size=1))
@settings(max_examples=50)
def test_the_tokenizers_library_reads_our_file_the_same_way(tmp_path_factory, text):
    directory = tmp_path_factory.mktemp("tokenizer")
    ours = CharTokenizer.from_text(text)
    save_tokenizer(str(directory), ours, 8)
    theirs = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert theirs.encode(text).ids == ours.encode(text).tolist()
    assert theirs.decode(ours.encode(text).tolist()) == text
    assert theirs.get_vocab_size() == ours.vocab_size


def test_a_saved_character_tokenizer_is_read_back(tmp_path):
    save_tokenizer(str(tmp_path), CharTokenizer.from_text(TEXT), 8)
    read = load_tokenizer(str(tmp_path))
    assert isinstance(read, CharTokenizer) and read.chars == sorted(set(TEXT))


def test_a_character_tokenizer_in_another_order_is_read_back_too(tmp_path):
    """Ours are in code-point order; somebody else's file need not be."""
    save_tokenizer(str(tmp_path), CharTokenizer("abc"), 8)
    path = tmp_path / "tokenizer.json"
    spec = json.loads(path.read_text())
    spec["model"]["vocab"] = {"c": 0, "a": 1, "b": 2}
    path.write_text(json.dumps(spec))
    read = load_tokenizer(str(tmp_path))
    assert read.encode("abc").tolist() == [1, 2, 0] and read.decode([0, 1, 2]) == "cab"


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizing with the `tokenizers` library


@pytest.fixture(scope="module")
def byte_pairs():
    """A small byte-level byte-pair encoding of GPT-2's kind, trained on the spot."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
    )
    bpe.train_from_iterator([TEXT * 20], trainer)
    return bpe


@given(st.text())
def test_any_text_comes_back_from_its_byte_pairs(byte_pairs, text):
    tokenizer = LibraryTokenizer(byte_pairs)
    ids = tokenizer.encode(text)
    assert ids.dtype == torch.int64 and tokenizer.decode(ids) == text


def test_byte_pairs_are_fewer_than_bytes(byte_pairs):
    assert len(LibraryTokenizer(byte_pairs).encode(TEXT)) < len(TEXT.encode())


def test_special_tokens_come_back_as_text(byte_pairs):
    tokenizer = LibraryTokenizer(byte_pairs)
    assert tokenizer.decode(tokenizer.encode("a<|endoftext|>b")) == "a<|endoftext|>b"


def test_a_saved_library_tokenizer_is_read_back(byte_pairs, tmp_path):
    save_tokenizer(str(tmp_path), LibraryTokenizer(byte_pairs), 8)
    read = load_tokenizer(str(tmp_path))
    assert read.vocab_size == 300 and torch.equal(read.encode(TEXT), LibraryTokenizer(byte_pairs).encode(TEXT))


@given(text=st.text())
def test_gpt2s_older_pair_of_files_encodes_the_same(byte_pairs, tmp_path_factory, text):
    directory = tmp_path_factory.mktemp("pair")
    byte_pairs.model.save(str(directory))  # vocab.json and merges.txt
    read = load_tokenizer(str(directory))
    assert (
        torch.equal(read.encode(text), LibraryTokenizer(byte_pairs).encode(text))
        and read.decode(read.encode(text)) == text
    )


def test_a_file_that_cuts_or_pads_texts_does_so_no_longer(byte_pairs, tmp_path):
    """Published tokenizer.json files often carry the truncation of their training; a text is not to be cut by it."""
    copy = tokenizers.Tokenizer.from_str(byte_pairs.to_str())
    copy.enable_truncation(max_length=4)
    copy.enable_padding(length=64)
    copy.save(str(tmp_path / "tokenizer.json"))
    read = load_tokenizer(str(tmp_path))
    assert read.decode(read.encode(TEXT)) == TEXT


def test_a_directory_without_a_tokenizer_has_none(tmp_path):
    assert load_tokenizer(str(tmp_path)) is None


def test_an_empty_prompt_becomes_a_line_break():
    assert prompt_tokens(CharTokenizer("\nab"), "").tolist() == [[0]]
    assert prompt_tokens(CharTokenizer("ab"), "").tolist() == [[0]]  # where there is none, the first token
    assert prompt_tokens(CharTokenizer("\nab"), "ba").tolist() == [[2, 1]]


# ---------------------------------------------------------------------------------------------------------------------
# Bytes, and byte pairs of one's own text


@pytest.fixture(scope="module")
def made():
    """One of each kind that says any text."""
    return {"bytes": ByteTokenizer(), "bpe": train_bpe([TEXT * 20], 300)}


KINDS = pytest.mark.parametrize("kind", ["bytes", "bpe"])


@KINDS
@given(text=st.text())
def test_any_text_comes_back_exactly(made, kind, text):
    ids = made[kind].encode(text)
    assert ids.dtype == torch.int64 and ids.dim() == 1
    assert made[kind].decode(ids) == made[kind].decode(ids.tolist()) == text
    assert len(ids) == 0 or 0 <= int(ids.min()) <= int(ids.max()) < made[kind].vocab_size


@given(st.text())
def test_a_byte_token_is_the_byte(text):
    assert ByteTokenizer().encode(text).tolist() == list(text.encode())


def test_the_letters_of_bytes_are_the_librarys():
    assert sorted(byte_letters()) == sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert len(set(byte_letters())) == 256


@KINDS
@given(text=st.text())
@settings(max_examples=30)
def test_auto_tokenizer_reads_what_is_saved_and_gives_the_text_back(made, kind, tmp_path_factory, text):
    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.getbasetemp() / f"auto-{kind}"
    if not path.exists():
        path.mkdir()
        save_tokenizer(str(path), made[kind], 64)
    if kind not in auto:
        auto[kind] = transformers.AutoTokenizer.from_pretrained(str(path))
    ids = auto[kind].encode(text)
    assert ids == made[kind].encode(text).tolist()
    assert auto[kind].decode(ids) == text


auto = {}


@KINDS
def test_what_is_saved_is_read_back_as_the_same(made, kind, tmp_path):
    save_tokenizer(str(tmp_path), made[kind], 8)
    read = load_tokenizer(str(tmp_path))
    assert type(read) is type(made[kind]) and read.vocab_size == made[kind].vocab_size
    assert torch.equal(read.encode(TEXT), made[kind].encode(TEXT))
    assert tokenizer_hash(read) == tokenizer_hash(made[kind])


def test_byte_pairs_are_the_same_each_time_and_their_number_is_that_asked_for():
    one, other = (train_bpe(iter([TEXT * 20, "another text " * 30]), 280) for _ in range(2))
    assert one.spec() == other.spec() and one.vocab_size == 280


def test_byte_pairs_are_learned_from_a_bounded_part_of_the_text(monkeypatch):
    monkeypatch.setattr(module, "MOST_CHARACTERS", 1000)
    read = []

    def texts():
        for i in range(1000):
            read.append(i)
            yield "ab" * 50

    assert train_bpe(texts(), 260).vocab_size == 260
    assert len(read) <= 11


def test_the_parts_to_learn_from_are_spread_over_a_long_text(monkeypatch):
    monkeypatch.setattr(module, "MOST_CHARACTERS", 1000)
    texts = [f"{i:0100d}" for i in range(35)]
    assert list(module.spread(texts, 3500)) == texts[::4]
    assert list(module.spread(texts[:10], 1000)) == texts[:10] and list(module.spread(texts[:11], 1100)) == texts[:11:2]


def test_half_a_surrogate_pair_is_named():
    with pytest.raises(UserError, match=r"without the character\(s\) '\\ud800' \(U\+D800\)"):
        ByteTokenizer().encode("a\ud800b")


def test_the_hash_tells_vocabularies_apart_but_not_layouts(byte_pairs, tmp_path):
    several = [CharTokenizer("abc"), CharTokenizer("abd"), ByteTokenizer(), LibraryTokenizer(byte_pairs)]
    assert len(set(map(tokenizer_hash, several))) == 4
    bare = train_bpe([TEXT * 20], 300)
    bare._tokenizer.model.save(str(tmp_path))  # vocab.json and merges.txt, GPT-2's older pair
    assert tokenizer_hash(load_tokenizer(str(tmp_path))) == tokenizer_hash(bare)


# ---------------------------------------------------------------------------------------------------------------------
# By name


def named(name, text=TEXT * 20):
    return make_tokenizer(name, lambda: set(text), lambda: iter([text]))


def test_each_name_makes_its_kind(made, tmp_path):
    assert named("chars").chars == sorted(set(TEXT))
    assert isinstance(named("bytes"), ByteTokenizer)
    assert named("bpe:300").spec() == made["bpe"].spec()
    save_tokenizer(str(tmp_path), made["bpe"], 8)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert named(str(path)).spec() == made["bpe"].spec()


def test_gpt2_is_the_published_one_in_the_hubs_cache(made, tmp_path, monkeypatch):
    import checkpoint

    save_tokenizer(str(tmp_path), made["bpe"], 8)
    monkeypatch.setattr(checkpoint, "find_on_hub", lambda name, files: {"gpt2": str(tmp_path)}[name])
    assert named("gpt2").spec() == made["bpe"].spec()


@pytest.mark.parametrize("name", ["bpe", "bpe:", "bpe:255", "bpe:-300", "bpe:3.5", "bpe:99999999", "nowhere", "Chars"])
def test_other_names_are_refused(name):
    with pytest.raises(UserError, match=f"^--tokenizer {name}: (wants bpe|there is no such thing)"):
        check_name(name)


def test_a_directory_without_a_tokenizer_is_no_tokenizer(tmp_path):
    with pytest.raises(UserError, match=r"there is no tokenizer\.json in"):
        named(str(tmp_path))


def test_a_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json: is not a tokenizer file"):
        named(str(tmp_path / "tokenizer.json"))


def test_a_tokenizer_that_changes_the_text_is_refused(tmp_path):
    lower = tokenizers.Tokenizer.from_str(json.dumps(train_bpe([TEXT * 20], 300).spec()))
    lower.normalizer = tokenizers.normalizers.Lowercase()
    lower.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="changes the text"):
        named(str(tmp_path))


def changed(change):
    """A byte-level tokenizer of the library, changed."""
    bpe = tokenizers.Tokenizer.from_str(json.dumps(train_bpe([TEXT * 20], 300).spec()))
    change(bpe)
    return bpe


def spaces_before(bpe):
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)


def without_some_bytes(bpe):
    bpe.model = tokenizers.models.BPE({letter: i for i, letter in enumerate(byte_letters()[:-12])}, [])


def sentence_pieces(bpe):
    """Llama's kind: a vocabulary of characters and bytes, in which a word begins with a mark."""
    vocab = {"\u2581": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}}
    bpe.model = tokenizers.models.BPE(vocab, [], byte_fallback=True)
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    decoders = tokenizers.decoders
    bpe.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])


def words_alone(bpe):
    bpe.model = tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="<unk>")


CHANGES = {
    "NFC": lambda bpe: setattr(bpe, "normalizer", tokenizers.normalizers.NFC()),
    "NFD": lambda bpe: setattr(bpe, "normalizer", tokenizers.normalizers.NFD()),
    "NFKC": lambda bpe: setattr(bpe, "normalizer", tokenizers.normalizers.NFKC()),
    "strip": lambda bpe: setattr(bpe, "normalizer", tokenizers.normalizers.Strip()),
    "no line breaks": lambda bpe: setattr(bpe, "normalizer", tokenizers.normalizers.Replace("\r\n", "\n")),
    "mask": lambda bpe: bpe.add_special_tokens([tokenizers.AddedToken("<mask>", lstrip=True)]),
    "spaces before": spaces_before,
    "without some bytes": without_some_bytes,
    "sentence pieces": sentence_pieces,
    "words alone": words_alone,
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_tokenizer_that_changes_any_text_is_refused(tmp_path, name):
    """Whatever the text that it is to be used for, which here comes back as it was."""
    changed(CHANGES[name]).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"changes the text .*; use a byte-level one") as error:
        named(str(tmp_path), "a")
    assert "\n" not in str(error.value)


def test_a_vocabulary_of_characters_is_used_for_a_text_that_it_knows(tmp_path):
    """In the order of ours or of somebody else; what is not in it is told, wherever in the text it stands."""
    save_tokenizer(str(tmp_path), CharTokenizer(sorted(set(TEXT))[::-1]), 8)
    assert named(str(tmp_path), TEXT).chars == sorted(set(TEXT))[::-1]
    with pytest.raises(UserError, match=r"has no token for the character\(s\) 'X' \(U\+0058\); use a byte-level one"):
        named(str(tmp_path), TEXT * 1000 + "X")


def test_a_text_without_a_part_to_train_on_needs_no_tokenizer_to_fail(made, tmp_path):
    save_tokenizer(str(tmp_path), made["bpe"], 8)
    assert make_tokenizer(str(tmp_path), set, lambda: iter(())).spec() == made["bpe"].spec()


# ---------------------------------------------------------------------------------------------------------------------
# Token by token


@KINDS
@given(text=st.text(st.characters(exclude_characters="\ufffd", exclude_categories=["Cs"])), n=st.integers(1, 3))
def test_written_token_by_token_no_character_is_ever_half(made, kind, text, n):
    writer, printed = TextWriter(made[kind]), ""
    text = text * n
    for token in made[kind].encode(text).tolist():
        printed += writer.add(token)
        assert text.startswith(printed)
    assert printed == text and writer.rest() == ""


@KINDS
def test_a_long_text_is_written_whole_token_by_token(made, kind):
    writer, text = TextWriter(made[kind]), "日本語 naïve 🙂" * 300
    assert "".join(map(writer.add, made[kind].encode(text).tolist())) == text
    assert len(writer.ids) < 300, "and is not decoded from its beginning each time"


def test_a_text_that_ends_within_a_character_is_written_without_it():
    writer = TextWriter(ByteTokenizer())
    assert [writer.add(byte) for byte in "aé".encode()[:2]] == ["a", ""] and writer.rest() == ""


def test_bytes_that_are_no_text_do_not_hold_up_what_follows():
    writer = TextWriter(ByteTokenizer())
    assert [writer.add(byte) for byte in b"a\xffb"] == ["a", "", "\ufffdb"]


def test_a_text_that_has_the_replacement_character_itself_keeps_it_at_its_end():
    tokenizer = CharTokenizer.from_text("a\ufffd")
    writer = TextWriter(tokenizer)
    shown = [writer.add(token) for token in tokenizer.encode("a\ufffd\ufffd").tolist()]
    assert shown == ["a", "\ufffd", "\ufffd"] and writer.rest() == ""
