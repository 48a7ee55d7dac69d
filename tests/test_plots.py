"""plots.py: every function returns a figure that can be saved; what it shows are the numbers it was given."""

import io
import math
import warnings

import pytest
import torch
from matplotlib.figure import Figure

import plots
from generate import Hypothesis
from utils import UserError

METRICS = [
    {"step": 1, "train_loss": 4.0, "lr": 1e-3},
    {"step": 10, "train_loss": 3.0},
    {"step": 10, "val_loss": 3.2},
    {"step": 20, "train_loss": 2.0},
    {"step": 20, "val_loss": 2.9},
    {"step": 30, "val_loss": 3.1},
]


def lines(figure):
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in figure.axes[0].lines}


def png(figure):
    """The figure as the bytes of a PNG file; a warning (a character that the font lacks, say) is an error."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(file, dpi=30)
    return file.getvalue()


def test_the_loss_curve_shows_every_training_and_validation_loss_at_its_step():
    curves = lines(plots.loss_curve(METRICS))
    assert curves == {"training (one batch)": ([1, 10, 20], [4, 3, 2]), "validation": ([10, 20, 30], [3.2, 2.9, 3.1])}


def test_the_loss_curve_names_the_best_validation_loss():
    assert [note.get_text() for note in plots.loss_curve(METRICS).axes[0].texts] == ["best 2.900"]


@pytest.mark.parametrize("metrics", [[], METRICS[:1], METRICS[2:3], METRICS], ids=["none", "train", "val", "both"])
def test_the_loss_curve_of_a_run_that_has_just_begun_can_be_drawn(metrics):
    assert png(plots.loss_curve(metrics)).startswith(b"\x89PNG")


def test_a_bigram_table_shows_the_probabilities_and_labels_every_character():
    probs = torch.tensor([[0.1, 0.9], [0.5, 0.5]])
    figure = plots.bigram_table(probs, ["a", "\n"])
    axes = figure.axes[0]
    assert torch.equal(torch.as_tensor(axes.images[0].get_array().tolist()), probs)
    assert [t.get_text() for t in axes.get_xticklabels()][:2] == ["a", "↵"]
    assert [t.get_text() for t in axes.get_yticklabels()][:2] == ["a", "↵"]


def test_characters_that_leave_no_mark_or_that_the_font_lacks_get_a_label_that_can_be_drawn():
    chars = ["\n", "\r", "\t", " ", "\x00", "\u200b", "\ufeff", "é", "中", "\U0001f600", "$", "\\", "_", "^", "d"]
    labels = [plots.visible(c) for c in chars]
    assert all(label.strip() for label in labels) and len(set(labels)) == len(chars)
    assert png(plots.bigram_table(torch.full((15, 15), 1 / 15), chars)).startswith(b"\x89PNG")


def test_a_token_of_several_characters_gets_a_label_that_can_be_drawn():
    tokens = ["the", " the", "\n\n", "", "$a$", "\u200b!", "$^_$"]
    labels = [plots.visible(token) for token in tokens]
    assert labels == ["the", "␣the", "↵↵", "", r"\$a\$", "200b!", r"\$^_\$"]
    assert png(plots.bigram_table(torch.full((7, 7), 1 / 7), tokens)).startswith(b"\x89PNG")


def test_mixing_weights_are_stacked_to_one():
    figure = plots.mixing_weights(torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]]), ["0", "1"])
    bars = figure.axes[0].patches
    tops = [max(b.get_y() + b.get_height() for b in bars if round(b.get_x() + b.get_width() / 2) == i) for i in (0, 1)]
    assert tops == pytest.approx([1, 1])
    assert png(figure).startswith(b"\x89PNG")


def test_a_picture_is_saved_in_the_format_of_its_name(tmp_path, capsys):
    for name, start in (("a.png", b"\x89PNG"), ("b.svg", b"<?xml"), ("c.pdf", b"%PDF"), ("d", b"\x89PNG")):
        plots.save_picture(plots.loss_curve(METRICS), str(tmp_path / name))
        assert (tmp_path / name).read_bytes().startswith(start)
        assert capsys.readouterr().out == f"picture: {tmp_path / name}\n"


def test_a_file_that_is_no_picture_by_its_name_is_not_overwritten(tmp_path):
    (tmp_path / "Makefile").write_text("precious")
    with pytest.raises(UserError, match="Makefile: is there already and no picture by its name; name a"):
        plots.save_picture(plots.loss_curve(METRICS), str(tmp_path / "Makefile"))
    assert (tmp_path / "Makefile").read_text() == "precious"


def test_a_single_figure_is_a_point():
    [line] = plots.loss_curve([dict(step=1, train_loss=2.0)]).axes[0].lines
    assert line.get_marker() == "o"
    assert plots.loss_curve(METRICS).axes[0].lines[0].get_marker() != "o"


def test_a_picture_that_is_cut_off_leaves_the_one_before(tmp_path, monkeypatch):
    def full(self, path, **_):
        with open(path, "wb") as f:
            f.write(b"half")
        raise OSError(28, "No space left on device")

    (tmp_path / "a.png").write_bytes(b"before")
    monkeypatch.setattr(plots.Figure, "savefig", full)
    with pytest.raises(UserError, match=r"--out .*cannot be written"):
        plots.save_picture(plots.loss_curve(METRICS), str(tmp_path / "a.png"))
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.png", b"before")]


@pytest.mark.parametrize("name", ["nowhere/a.png", "a.banana"])
def test_a_picture_that_cannot_be_written_is_a_user_error_and_leaves_no_file(tmp_path, name):
    with pytest.raises(UserError, match=r"--out .*cannot be written"):
        plots.save_picture(plots.loss_curve(METRICS), str(tmp_path / name))
    assert list(tmp_path.iterdir()) == []


def test_drawing_opens_no_window_and_keeps_no_figure_alive():
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    assert isinstance(plots.new_figure()[0], Figure) and isinstance(plots.loss_curve(METRICS), Figure)
    assert plt.get_fignums() == before


def test_frequencies_put_the_commonest_first():
    axes = plots.frequencies(torch.tensor([0.2, 0.5, 0.3]), ["a", " ", "c"]).axes[0]
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([50, 30, 20])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["␣", "c", "a"]


def test_curves_and_the_levels_to_compare_with():
    figure = plots.curves({"one": ([1, 2], [3, 4])}, "title", levels={"counting": 2.5})
    assert lines(figure)["one"] == ([1, 2], [3, 4])
    assert [note.get_text() for note in figure.axes[0].texts] == ["counting"]
    assert png(figure).startswith(b"\x89PNG")


def test_attention_maps_leave_the_future_blank():
    weights = torch.tensor([[0.9, 0.1], [0.4, 0.6]])  # 0.1 lies in the future and is not to be shown
    figure = plots.attention_maps([weights, weights], "ab", ["first", "second"], numbers=True)
    assert len(figure.axes) == 2
    shown = figure.axes[0].images[0].get_array().filled(-1).tolist()
    assert torch.allclose(torch.tensor(shown), torch.tensor([[0.9, -1.0], [0.4, 0.6]]))
    assert [text.get_text() for text in figure.axes[0].texts] == ["0.90", "0.40", "0.60"]
    whole = plots.attention_maps([weights], ["a", "bc"], ["first"], numbers=True, future=True)
    assert [text.get_text() for text in whole.axes[0].texts] == ["0.90", "0.10", "0.40", "0.60"]
    assert png(figure).startswith(b"\x89PNG")


def test_the_ladder_has_a_bar_for_each_model_with_both_measures():
    axes = plots.ladder(["bigram", "GPT"], [2.3, 1.2], [3.32, 1.73]).axes[0]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([2.3, 1.2])
    assert [text.get_text().strip() for text in axes.texts] == ["2.300  (3.32)", "1.200  (1.73)"]


def test_a_surprise_map_has_a_row_for_each_model():
    figure = plots.surprise_map("ab", ["one", "two"], [[0.1, 0.2], [0.3, 0.4]])
    assert figure.axes[0].images[0].get_array().tolist() == [[0.1, 0.2], [0.3, 0.4]]
    assert png(figure).startswith(b"\x89PNG")


def test_next_token_bars_show_the_likeliest_in_the_order_of_the_first_panel():
    figure = plots.next_token_bars(torch.tensor([[0.1, 0.6, 0.3], [0.3, 0.3, 0.4]]), "abc", ["one", "two"], most=2)
    heights = [[bar.get_height() for bar in axes.patches] for axes in figure.axes]
    assert heights == [pytest.approx([60, 30]), pytest.approx([30, 40])]


def test_every_head_has_a_square_and_the_future_is_blank():
    attention = torch.rand(2, 3, 4, 4)
    figure = plots.all_heads(attention, "ab\n$")
    assert [axes.get_title() for axes in figure.axes] == [f"layer {i}, head {j}" for i in (1, 2) for j in (1, 2, 3)]
    shown = torch.tensor(figure.axes[4].images[0].get_array().filled(0).tolist())
    assert torch.allclose(shown, attention[1, 1].tril())
    assert [label.get_text() for label in figure.axes[3].get_yticklabels()] == ["a", "b", "↵", "$"]
    assert png(figure).startswith(b"\x89PNG")


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("scores", [[[0.5, -0.25], [1.0, 0.0]], [[0.0]], [[0.0004, float("nan")]]])
def test_head_scores_are_written_into_their_squares(scores, signed):
    figure = plots.head_scores(torch.tensor(scores), "title", signed)
    written = [float(text.get_text()) for text in figure.axes[0].texts]
    assert written == pytest.approx([score for row in scores for score in row], nan_ok=True)
    low, high = figure.axes[0].images[0].get_clim()
    assert (low == -high if signed else low == 0) and high > 0
    assert png(figure).startswith(b"\x89PNG")


def test_the_logit_lens_writes_the_first_guess_and_frames_it_where_it_is_right():
    probs = torch.tensor([[[0.2, 0.8], [0.6, 0.4]], [[0.9, 0.1], [0.3, 0.7]]])  # 2 rows, 2 tokens read, V = 2
    figure = plots.logit_lens(probs, "a\n", "xy", answers="a\n")
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["↵", "a", "a", "↵"]
    assert [(round(p.get_x()), round(p.get_y())) for p in axes.patches] == [(0, 1), (1, 1)]
    assert axes.images[0].get_array().tolist() == pytest.approx(torch.tensor([[0.8, 0.6], [0.9, 0.7]]).numpy())
    assert png(figure).startswith(b"\x89PNG")
    assert not plots.logit_lens(probs, "a\n", "xy").axes[0].patches


def test_an_embedding_map_writes_each_label_at_its_point():
    points = torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]])
    figure = plots.embedding_map(points, ["a", " ", "$"], ["letters", "others", "others"], torch.tensor([0.4, 0.25]))
    axes = figure.axes[0]
    assert [(text.get_text(), text.get_position()) for text in axes.texts] == [
        ("a", (0, 1)),
        ("␣", (2, 3)),
        ("$", (4, 5)),
    ]
    assert axes.get_xlabel() == "40% of the variance" and axes.get_ylabel() == "25% of the variance"
    assert png(figure).startswith(b"\x89PNG")
    many = [str(i) for i in range(9)]  # more groups than colours
    assert png(plots.embedding_map(torch.rand(9, 2), many, many)).startswith(b"\x89PNG")


def test_a_neurons_text_is_the_darker_the_more_active():
    figure = plots.neuron_text(["ab", "c\n"], [[0.0, 2.0], [-1.0, 1.0]], marks=[1, 0])
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["a", "b", "c", "↵"]
    squares = [patch for patch in axes.patches if patch.get_fill()]
    darkness = [3 - sum(patch.get_facecolor()[:3]) for patch in squares]
    assert darkness[0] == darkness[2] < darkness[3] < darkness[1]
    frames = [patch for patch in axes.patches if not patch.get_fill()]
    assert [(patch.get_x(), round(patch.get_y())) for patch in frames] == [(0.5, 0), (-0.5, 1)]
    assert png(figure).startswith(b"\x89PNG")
    assert png(plots.neuron_text(["$_", ""], [[0.0, 0.0], []])).startswith(b"\x89PNG")  # never active; an empty line


def test_curves_draw_every_line_in_a_colour_of_its_own():
    figure = plots.curves({str(i): ([1, 2], [i, i]) for i in range(7)}, "title")
    assert len({line.get_color() for line in figure.axes[0].lines}) == 7


def test_coloured_tokens_show_every_piece_once_and_in_order_even_where_a_row_is_broken():
    rows = [["To", "mas", " ", "\n"], [0xC3, 0xA9, "\U0001f642"], list("abcdefghij")]
    figure = plots.coloured_tokens(rows, ["pieces", "bytes", "letters"], columns=6)
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts[:3] == ["pieces: 4 tokens", "bytes: 3 tokens", "letters: 10 tokens"]
    assert texts[3:] == ["To", "mas", "␣", "↵", "c3", "a9", "1f642", *"abcdefghij"]
    boxes = figure.axes[0].patches
    assert len(boxes) == 17
    assert all(a.get_facecolor() != b.get_facecolor() for a, b in zip(boxes[:3], boxes[1:4]))
    spans = [(b.get_y(), b.get_x(), b.get_x() + b.get_width()) for b in boxes]
    assert all(a[0] < b[0] or a[2] <= b[1] + 1e-9 for a, b in zip(spans, spans[1:])), "boxes overlap"
    left, right = figure.axes[0].get_xlim()
    assert all(left <= b.get_x() and b.get_x() + b.get_width() <= right for b in boxes)
    assert png(figure).startswith(b"\x89PNG")


def test_coloured_tokens_may_be_formulas():
    figure = plots.coloured_tokens([["$$", "$_$", "x"]], ["LaTeX"])
    assert [patch.get_width() for patch in figure.axes[0].patches] == pytest.approx(
        [0.103 * n for n in (2.2, 3.2, 1.2)]
    )
    assert png(figure).startswith(b"\x89PNG")


def test_a_number_table_writes_each_number_in_its_cell():
    figure = plots.number_table(torch.tensor([[1, 2, 0], [0, 12, 3]]), "a ", "xyz", "title")
    axes = figure.axes[0]
    assert [(text.get_text(), text.get_position()) for text in axes.texts][:4] == [
        ("1", (0, 0)),
        ("2", (1, 0)),
        ("0", (2, 0)),
        ("0", (0, 1)),
    ]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["a", "␣"]
    assert png(plots.number_table([[0, 0]], "a", "bc", "nothing yet")).startswith(b"\x89PNG")


def test_bars_have_the_width_of_their_values():
    axes = plots.bars(["one", "two"], [3.0, 1.0], "title", "{:.1f} MB").axes[0]
    assert [bar.get_width() for bar in axes.patches] == [3.0, 1.0]
    assert [text.get_text().strip() for text in axes.texts] == ["3.0 MB", "1.0 MB"]


def test_the_learning_rate_finder_keeps_a_loss_that_bursts_from_flattening_the_curve():
    figure = plots.learning_rates([1e-4, 1e-3, 1e-2, 1e-1], [4.0, 3.0, 2.0, 500.0], 1e-3)
    low, high = figure.axes[0].get_ylim()
    assert low < 2 and 4 < high < 6
    assert lines(figure)["_child1"][0] == [1e-3, 1e-3]
    assert png(figure).startswith(b"\x89PNG")


def test_reshaped_shows_both_distributions_in_the_order_of_the_first():
    before, after = torch.tensor([0.1, 0.6, 0.3]), torch.tensor([0.0, 0.7, 0.3])
    figure = plots.reshaped(before, [after, before], "abc", ["one", "two"])
    heights = [[bar.get_height() for bar in axes.patches] for axes in figure.axes]
    assert heights[0] == pytest.approx([70, 30, 0, 60, 30, 10])
    assert heights[1] == pytest.approx([60, 30, 10, 60, 30, 10])
    assert png(figure).startswith(b"\x89PNG")


def test_a_beam_tree_joins_each_beam_to_the_one_that_it_extends():
    levels = [
        [Hypothesis(math.log(0.6), [0]), Hypothesis(math.log(0.4), [1])],
        [Hypothesis(math.log(0.36), [1, 0]), Hypothesis(math.log(0.3), [1, 1])],  # both from the second; 0 is dropped
    ]
    figure = plots.beam_tree(levels, "ab", "prompt")
    axes = figure.axes[0]
    edges = {(tuple(line.get_xdata()), tuple(line.get_ydata())): line.get_color() for line in axes.lines}
    assert edges == {
        ((0, 1), (0.5, 0)): "#A0A0A0",
        ((0, 1), (0.5, 1)): plots.BLUE,
        ((1, 2), (1, 0)): plots.BLUE,
        ((1, 2), (1, 1)): "black",
    }
    assert [text.get_text() for text in axes.texts] == ["prompt", "a", "b", "a", "b", "36 %", "30 %"]
    assert png(figure).startswith(b"\x89PNG")


def test_a_power_law_is_drawn_through_to_the_point_that_was_held_out():
    figure = plots.power_law([1e4, 1e5], [2.0, 1.8], {"law": lambda n: 3 * n**-0.05}, (1e6, 1.7), "title")
    drawn = lines(figure)
    assert drawn["fitted to these"] == ([1e4, 1e5], [2.0, 1.8]) and drawn["not seen by the fit"] == ([1e6], [1.7])
    xs, ys = drawn["law"]
    assert xs[0] == pytest.approx(1e4) and xs[-1] > 1e6
    assert ys == pytest.approx([3 * x**-0.05 for x in xs])
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["10 K", "100 K", "1.0 M"]
    assert png(figure).startswith(b"\x89PNG")
