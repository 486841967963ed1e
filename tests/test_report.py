import base64
import io
import os
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sklearn_backdoor import (
    AdditiveReverseEngineer,
    AutoReverseEngineer,
    BackdoorGuard,
    BackdoorTriggerClassifier,
    NCReverseEngineer,
    NeuronReverseEngineer,
    PatchTrigger,
    VictimNetwork,
    report,
)
from sklearn_backdoor._report_pictures import image_uri
from sklearn_backdoor._text import printable
from sklearn_backdoor.report import render_report, write_report
from sklearn_backdoor.reverse import SearchRecord
from tests.browser import dump_dom
from tests.common import LinearNetwork, corner_trigger, linear_images

SECTIONS = [
    *("verdict", "triggers", "statistics", "scores", "features", "sources"),
    *("flagged", "limits", "provenance"),
]
HOSTILE = [
    "<script>document.title='pwned'</script>",
    "\"><img id=canary src=x onerror=document.title='pwned'>",
    "\x1b[31mred\x1b[0m",
    "\u202egnp.exe",
    "{{7*7}}{% raise %}",
    "</style></title><h1 id=canary>$x^2$</h1>",
]
CANARY = "<iframe id=canary src=data:,></iframe>"


class Page(HTMLParser):
    """What a report holds: text, tags, identifiers, sources and tables' cells."""

    def __init__(self, text):
        super().__init__()
        self.source, self.text, self.title = text, "", ""
        self.tags, self.ids, self.attributes, self.thumbs = [], [], [], []
        self.tables = {}
        self._open, self._cell, self._thumb = None, False, False
        self.feed(text)
        self.text = " ".join(self.text.split())
        self.thumbs = [" ".join(one.split()) for one in self.thumbs]

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append(tag)
        self.attributes += attrs
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if tag == "table":
            self._open = self.tables.setdefault(attributes.get("id"), [])
        elif tag == "tr":
            self._open.append([])
        elif tag in ("td", "th"):
            self._open[-1].append("")
            self._cell = True
        elif tag == "ul":
            self._thumb = attributes.get("class") == "thumbs"
        elif tag == "li" and self._thumb:
            self.thumbs.append("")

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._cell = False
            self._open[-1][-1] = " ".join(self._open[-1][-1].split())
        elif tag == "ul":
            self._thumb = False

    def handle_data(self, data):
        if self.tags[-1:] == ["title"] and not self.title:
            self.title = data
        if "style" in self.tags[-1:]:
            return
        self.text += data
        if self._cell:
            self._open[-1][-1] += data
        if self._thumb and self.thumbs:
            self.thumbs[-1] += data


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny networks gain nothing from threads, and lose much on a busy machine."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


def victim_of(n_classes=6, backdoor=100.0, classes=None):
    network = LinearNetwork(n_classes, backdoor=backdoor).eval()
    return VictimNetwork(network, classes=classes)


@pytest.fixture(scope="module")
def images():
    return linear_images()


@pytest.fixture(scope="module")
def guard(images):
    victim = victim_of()
    return BackdoorGuard(victim, NCReverseEngineer(victim)).fit(*images)


@pytest.fixture(scope="module")
def full(guard, images):
    """Return the page with all that a report can hold."""
    X, y = checked()
    return page_of(guard, images, X_check=X, y_check=y, check_names=names_of(X))


@pytest.fixture(scope="module")
def given(images):
    return make_given(corner_trigger()).fit(*images)


def make_given(trigger):
    cheap = make_pipeline(StandardScaler(), BackdoorTriggerClassifier())
    return BackdoorGuard(victim_of(), trigger, cheap, target_class=2)


@pytest.fixture(scope="module")
def clean_search(images):
    return NCReverseEngineer(victim_of(backdoor=0.0)).fit(*images)


def checked():
    """Return triggered images of all classes but 2, and clean ones of all."""
    X, y = linear_images(4, seed=1)
    stamped = corner_trigger().embed(X[y != 2])
    return np.concatenate([X, stamped]), np.concatenate([y, y[y != 2]])


def names_of(X):
    return [f"in/{number}.png" for number in range(len(X))]


def page_of(guard, images, **options):
    return Page(render_report(guard, *images, **options))


def as_if(guard, **changes):
    """Return a guard that defends nothing, as if its search had been another."""
    record = SearchRecord.from_engineer(guard.engineer_)
    none = record.target_classes_[:0]
    changes = {"target_classes_": none, "verdict_": "nothing found", **changes}
    twin = BackdoorGuard(guard.victim)
    twin.__dict__.update(vars(guard))
    twin.engineer_ = replace(record, **changes)
    twin.verdict_, twin.triggers_, twin.classifiers_ = changes["verdict_"], {}, {}
    twin.target_classes_, twin.target_class_ = none, None
    return twin


def number(value):
    if not np.isfinite(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def expected_row(engineer, position, method):
    index, p = engineer.anomaly_indices_[position], engineer.p_values_[position]
    label = engineer.classes_[position]
    reason = engineer.reasons_[position]
    converged = "yes" if engineer.converged_[position] else "no"
    return [
        str(label),
        method,
        number(engineer.norms_[position]),
        f"{engineer.success_rates_[position]:.1%}",
        number(index),
        f"{p:.2g}" if np.isfinite(p) else "–",
        f"{converged}: {reason}" if reason and converged == "no" else converged,
        "yes" if label in engineer.target_classes_ else "no",
    ]


def assert_offline(page):
    assert "script" not in page.tags and "link" not in page.tags[10:]
    assert not re.search(r"https?:|javascript:|url\(|@import", page.source)
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "srcset", "data", "action"):
            assert value.startswith("data:image/png;base64,")
        if name == "href":
            assert value.startswith("#") or value == "data:,"


def test_a_backdoor_is_named_explained_and_shown(full):
    page = full
    assert page.title == "Backdoor report: backdoored"
    assert "Backdoor found: class 2" in page.text
    assert "What to do next" in page.text and "Do not use the network bare" in page.text
    assert [one for one in page.ids if one in SECTIONS] == SECTIONS
    links = [value for name, value in page.attributes if name == "href"]
    assert {link[1:] for link in links if link != "data:,"} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert_offline(page)
    assert page.tags.count("article") == 6
    alts = [value for name, value in page.attributes if name == "alt"]
    assert len(alts) == page.tags.count("img") and all(alts)


def test_the_table_of_classes_holds_the_engineers_figures(guard, full):
    page = full
    _, *rows = page.tables["classes"]
    engineer = guard.engineer_
    wanted = [expected_row(engineer, k, "NCReverseEngineer") for k in range(6)]
    assert sorted(rows) == sorted(wanted)
    assert rows[0][0] == "2" and rows[0][-1] == "yes"  # the most suspicious first
    assert "searches" not in page.tables  # one search ran
    assert f"p-value below {0.05:g}" in page.text


def test_all_searches_of_the_automatic_one_are_tabulated(images):
    victim = victim_of()
    engineers = [
        ("patch", NCReverseEngineer(victim)),
        ("additive", AdditiveReverseEngineer(victim, sources="all")),
    ]
    engineer = AutoReverseEngineer(victim, engineers=engineers)
    guard = BackdoorGuard(victim, engineer).fit(*images)
    page = page_of(guard, images)
    found = guard.engineer_
    _, *rows = page.tables["searches"]
    for row, wanted in zip(rows, found.report_.to_dict("records"), strict=True):
        assert row[:5] == [
            wanted["method"],
            str(wanted["class"]),
            number(wanted["norm"]),
            f"{wanted['success_rate']:.1%}",
            number(wanted["anomaly_index"]),
        ]
        assert row[6] == f"{wanted['p_corrected']:.2g}"
        assert row[8] == ("yes" if wanted["flagged"] else "no")
    _, *rows = page.tables["classes"]
    wanted = [expected_row(found, k, found.methods_[k]) for k in range(6)]
    assert sorted(rows) == sorted(wanted)
    assert "corrected for 2 searches" in page.text


def test_what_neurons_show_is_not_called_the_size_of_a_pattern(images):
    victim = victim_of()
    engineer = NeuronReverseEngineer(victim).fit(*images)
    record = replace(
        SearchRecord.from_engineer(engineer),
        target_classes_=engineer.classes_[2:3],
        verdict_="backdoored",
    )
    guard = BackdoorGuard(victim, record).fit(*images)
    page = page_of(guard, images)
    text = " ".join(page.text.split())
    assert f"A pattern of size {number(record.trigger_.l2_norm)} (L2 norm" in text
    assert f"a shift of its channels by {number(record.norms_[2])} (L2" in text


def test_nothing_found_is_not_called_clean_and_no_section_vanishes(
    clean_search, images
):
    guard = BackdoorGuard(victim_of(backdoor=0.0)).fit(*images)
    assert guard.verdict_ == "nothing found"
    page = page_of(guard, images, X_check=images[0][:5], y_check=images[1][:5])
    assert "Nothing found. That is not proof that the network is clean" in page.text
    assert [one for one in page.ids if one in SECTIONS] == SECTIONS
    assert page.text.count("No class is guarded, because none was flagged") == 4
    assert "5 images were given to check" in page.text
    assert_offline(page)


def test_inconclusive_says_why_and_what_to_do():
    X, y = linear_images(n_classes=4)
    victim = victim_of(4)
    guard = BackdoorGuard(victim, NCReverseEngineer(victim)).fit(X, y)
    assert guard.verdict_ == "inconclusive"
    page = page_of(guard, (X, y))
    assert "Inconclusive" in page.text
    assert "It has 4 classes, and it takes 5 at least" in page.text
    assert "Try another search method" in page.text
    assert page.text.count("the search came to no verdict: there is nothing") == 3


def test_searches_that_did_not_converge_are_named_with_the_reason(guard, images):
    why = "<b>too few</b> steps"
    odd = as_if(
        guard,
        verdict_="inconclusive",
        converged_=np.array([True, False, False, False, True, True]),
        reasons_=("", "dull", why, why, "", ""),
    )
    page = page_of(odd, images)
    assert "NCReverseEngineer: 3 of 6 classes converged" in page.text
    assert f"(the usual reason: {why})" in page.text
    assert [row[6] for row in page.tables["classes"]].count(f"no: {why}") == 2


def test_a_trigger_that_was_given_is_shown_and_nothing_else_claimed(given, images):
    page = page_of(given, images)
    assert "A trigger was given: it leads to class 2" in page.text
    assert "No search was made" in page.text
    assert page.tags.count("article") == 1
    assert "works on 100% of the clean images of other classes" in page.text
    assert "classes" not in page.tables
    assert "none: the trigger was given" in page.text


def test_a_trigger_without_a_shape_of_its_own_can_be_shown(images):
    whole = make_given(PatchTrigger(mask=0.5, pattern=1.0))
    assert page_of(whole.fit(*images), images).tags.count("article") == 1


def test_a_class_that_is_guarded_on_request_is_not_called_flagged(clean_search, images):
    guard = BackdoorGuard(victim_of(backdoor=0.0), clean_search, target_class=3)
    page = page_of(guard.fit(*images), images)
    assert "Guarded on request: class 3" in page.text
    assert "The search by itself flagged no class" in page.text
    assert "Backdoor found" not in page.text


def test_searches_that_flag_by_something_else_than_p_values_say_so(guard, images):
    published = as_if(guard, threshold=3.5, alpha=None)
    page = page_of(published, images)
    assert "anomaly index of a small norm above 3.5" in page.text
    by_median = as_if(guard, method="B3DReverseEngineer", alpha=None)
    page = page_of(by_median, images)
    assert "norm below a quarter of the median" in page.text


def test_a_loaded_guard_gives_the_same_report(guard, images, full, tmp_path):
    X, y = checked()
    before, options = full, {"X_check": X, "y_check": y, "check_names": names_of(X)}
    guard.save(tmp_path / "guard", provenance={"weights_file": "suspect.pt"})
    loaded = BackdoorGuard.load(tmp_path / "guard", victim_of())
    assert isinstance(loaded.engineer_, SearchRecord)
    after = page_of(loaded, images, **options)
    for name in ("classes", "counts"):
        assert after.tables[name] == before.tables[name]
    assert after.thumbs == before.thumbs
    assert re.findall('src="([^"]+)', after.source) == re.findall(
        'src="([^"]+)', before.source
    )
    assert "suspect.pt" in after.text


def test_flagged_images_are_those_of_inspect_the_highest_score_first(guard, full):
    page, (X, y) = full, checked()
    wanted = []
    for name, origin, row in zip(
        names_of(X), y, guard.inspect(X).to_dict("records"), strict=True
    ):
        if row["is_trigger"]:
            wanted.append(
                (
                    -row["trigger_score"],
                    f"{name} network says {row['victim_label']} "
                    f"probably {row['label']} "
                    f"(known: {origin}) score {number(row['trigger_score'])}",
                )
            )
    assert len(wanted) > 10
    wanted.sort(key=lambda one: one[0])
    assert page.thumbs == [text for _, text in wanted]
    said = int(np.sum(guard.victim_.predict(X) == 2))
    assert f"{len(wanted)} of {len(X)} images are flagged" in page.text
    assert f"The network calls {said} of them 2" in page.text


def test_long_lists_are_cut_with_a_count_of_the_rest(guard, images, monkeypatch):
    monkeypatch.setattr(report, "_N_FLAGGED", 3)
    monkeypatch.setattr(report, "_N_CARDS", 2)
    X, _ = checked()
    page = page_of(guard, images, X_check=X)
    n_flagged = int(guard.is_trigger(X).sum())
    assert len(page.thumbs) == 3
    assert f"{n_flagged - 3} more are not shown" in page.text
    assert page.tags.count("article") == 2
    assert "The 2 most suspicious of 6 classes are shown" in page.text
    assert len(page.tables["classes"]) == 7


def rates_of(y_true, y_pred, target):
    """Count TPR, FPR and SIA one image at a time."""
    hits, among = [0, 0, 0], [0, 0, 0]
    for true, said in zip(y_true, y_pred, strict=True):
        if true == target:
            among[1] += 1
            hits[1] += said != target
        else:
            among[0] += 1
            among[2] += 1
            hits[0] += said != target
            hits[2] += said == true
    return [[f"{hit / n:.1%}", str(n)] for hit, n in zip(hits, among, strict=True)]


def rows_of_rates(page):
    rows = [row for row in page.tables[None] if len(row) == 4 and "(" in row[0]]
    return [[row[1], row[3]] for row in rows]


def test_rates_on_clean_images_are_held_out_in_folds(guard, images, full):
    page, (X, y) = full, images
    embedded = X.copy()
    embedded[y != 2] = guard.triggers_[2].embed(X[y != 2])
    said, Z = guard.victim_.predict_and_transform(embedded)
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    inferred = cross_val_predict(clone(guard.classifiers_[2]), Z, y, cv=folds)
    sent = said == 2
    assert rows_of_rates(page)[:3] == rates_of(y[sent], inferred[sent], 2)
    assert "judged in 5 folds" in page.text


def test_rates_on_checked_images_take_their_known_classes(guard, full):
    page, (X, y) = full, checked()
    seen = guard.inspect(X)
    sent = (seen["victim_label"] == 2).to_numpy()
    wanted = rates_of(y[sent], seen["label"][sent], 2)
    assert rows_of_rates(page)[3:] == wanted


def test_too_few_images_to_hold_out_are_said_to_flatter(given):
    X, y = linear_images(2)
    page = page_of(given, (X, y))
    assert "too few clean images to hold any out" in page.text


def test_images_that_never_reach_the_target_are_said_to(given, images):
    X, y = linear_images(2, seed=2)
    rows = y != 2
    page = page_of(given, images, X_check=X[rows], y_check=y[rows])
    assert "The network calls none of the checked images 2" in page.text
    assert page.thumbs == []
    page = page_of(given, images, X_check=X[:0], y_check=y[:0])
    assert "0 of 0 images are flagged" in page.text


def test_provenance_is_merged_and_told(guard, images):
    twin = as_if(guard)
    twin.provenance_ = {"weights_file": "old.pt", "weights_sha256": "ab12"}
    page = page_of(
        twin, images, provenance={"weights_file": "new.pt", "ticket": ["a", 1]}
    )
    facts = dict(row for row in page.tables[None] if len(row) == 2)
    assert facts["weights file"] == "new.pt"
    assert facts["SHA-256 of the weights file"] == "ab12"
    assert facts["ticket"] == "['a', 1]"
    assert facts["torch class"] == "LinearNetwork"
    assert facts["image shape"] == "1 × 4 × 4"
    assert facts["torch"] == torch.__version__
    assert facts["network right on"] == "100.0%"
    passes = guard.engineer_.n_image_passes_
    assert facts["images forward"] == f"{passes.forward:,}"
    assert page.tables["counts"][1:] == [[str(k), "8"] for k in range(6)]


def test_labels_that_do_not_fit_the_network_are_warned_of(given, images):
    X, y = images
    page = page_of(given, (X, (y + 1) % 6))
    assert "The network is right on only 0.0% of the clean images" in page.text


def test_piles_of_accents_do_not_paint_over_other_lines(given, images):
    page = page_of(given, images, provenance={"é": "e\u0301" + 20 * "\u0489" + "x"})
    facts = dict(row for row in page.tables[None] if len(row) == 2)
    assert facts["é"] == "e\u0301\u0489\u0489" + 18 * "\\u0489" + "x"


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"check_names": ["a"]}, ValueError, "check_names without X_check"),
        ({"y_check": [1]}, ValueError, "y_check without X_check"),
        (
            {"X_check": np.zeros((2, 1, 4, 4)), "check_names": ["a"]},
            ValueError,
            "1 names for 2 images",
        ),
        (
            {"X_check": np.zeros((1, 1, 4, 4)), "y_check": [77]},
            ValueError,
            "77",
        ),
        ({"X_check": np.zeros((1, 1, 5, 5))}, ValueError, "(1, 4, 4)"),
        ({"provenance": "me"}, TypeError, "provenance is a str"),
    ],
)
def test_input_that_does_not_fit_is_refused(given, images, options, error, words):
    with pytest.raises(error, match=re.escape(words)):
        render_report(given, *images, **options)


def test_what_is_no_fitted_guard_is_refused(given, images):
    with pytest.raises(TypeError, match="expected a BackdoorGuard"):
        render_report(given.victim_, *images)
    with pytest.raises(NotFittedError):
        render_report(BackdoorGuard(victim_of()), *images)
    X, y = images
    with pytest.raises(ValueError, match="at least 1 clean image"):
        render_report(given, X[y > 0], y[y > 0])


def test_a_file_is_written_whole_or_not_at_all(given, images, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "_N_TARGETS", 0)  # quick
    path = tmp_path / "report.html"
    write_report(path, given, *images)
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>") and text.rstrip().endswith("</html>")
    path.write_text("old")

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match=re.escape(f"{path} (no space left)")):
        write_report(path, given, *images)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.html"]


def test_a_file_that_cannot_be_written_is_named(given, images, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "_N_TARGETS", 0)  # quick
    absent = tmp_path / "absent" / "report.html"
    with pytest.raises(OSError, match=re.escape(str(absent))):
        write_report(absent, given, *images)
    with pytest.raises(OSError, match=re.escape(str(tmp_path))):
        write_report(tmp_path, given, *images)
    assert os.listdir(tmp_path) == []


def test_large_images_are_shrunk_by_the_mean_of_their_pixels():
    image = np.random.default_rng(0).uniform(size=(256, 256, 3))
    content = base64.b64decode(image_uri(image).removeprefix("data:image/png;base64,"))
    small = np.asarray(Image.open(io.BytesIO(content)), dtype=float)
    means = np.rint(image * 255).reshape(128, 2, 128, 2, 3).mean(axis=(1, 3))
    assert small.shape == (128, 128, 3)
    assert np.abs(small - means).max() <= 1  # rounded twice


@pytest.fixture(scope="module")
def hostile(images):
    """Return a report in which every name is an attack."""
    X, y = images
    victim = victim_of(classes=HOSTILE)
    names = np.array(HOSTILE)
    engineer = NCReverseEngineer(victim)
    guard = BackdoorGuard(victim, engineer).fit(X, names[y])
    X_check, y_check = checked()
    files = [f"{HOSTILE[k % 6]}{CANARY}{k}" for k in range(len(X_check))]
    return render_report(
        guard,
        X,
        names[y],
        X_check=X_check,
        check_names=files,
        y_check=names[y_check],
        provenance={
            "weights_file": HOSTILE[0],
            HOSTILE[1]: HOSTILE[3],
            "<b id=canary>": CANARY + "\n" + HOSTILE[2],
        },
    )


def assert_inert(page):
    assert page.title == "Backdoor report: backdoored"
    assert "canary" not in page.ids
    assert "script" not in page.tags and "iframe" not in page.tags
    for name in HOSTILE:
        assert " ".join(printable(name, None).split()) in page.text
    assert CANARY in page.text and "49" not in page.tables["classes"][5][0]
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069]", page.source)


def test_hostile_names_are_text(hostile):
    page = Page(hostile)
    assert_inert(page)
    assert_offline(Page(re.sub(r"<bdi.*?</bdi>", "", hostile, flags=re.DOTALL)))


def test_a_browser_obeys_no_name(hostile, tmp_path):
    path = tmp_path / "hostile.html"
    path.write_text(hostile, encoding="utf-8")
    assert_inert(Page(dump_dom(path)))


def test_no_name_needs_the_policy_and_a_narrow_page_does_not_scroll(hostile, tmp_path):
    policy = re.search(r"<meta http-equiv=[^>]*>", hostile)[0]
    measure = (
        "<script>onload = () => document.body.dataset.measured = [document.title, "
        "document.documentElement.scrollWidth, innerWidth].join('|')</script>"
    )
    text = hostile.replace(policy, "").replace("</body>", measure + "</body>")
    path = tmp_path / "open.html"
    path.write_text(text, encoding="utf-8")
    page = Page(dump_dom(path, width=390, height=1000))
    title, scroll, inner = dict(page.attributes)["data-measured"].split("|")
    assert title == "Backdoor report: backdoored"
    assert int(scroll) <= int(inner) <= 500
    assert page.tags.count("script") == 1 and "canary" not in page.ids
