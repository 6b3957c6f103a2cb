import hashlib
import json
from pathlib import Path
from typing import Any

from kintsugi_serve.schemas import Refusal


def test_an_image_comes_back_with_its_report_and_nothing_complains(
    tab: Any, served: Any, tmp_path: Path, part: Any
) -> None:
    tab.restored(part(tmp_path))
    assert served.queries == [{"defect_map": "true"}]
    report = tab.text("#report")
    for told in ("94.2 %", "71.0 %", "0.12 %", "0.04 %", "1.67 %", "unet@3", "9f2c-4e1", "model 81 ms", "✓ verified"):
        assert told in report
    assert report.count("✓ verified") == 2
    assert "No alarm" in tab.text("#verdict")
    assert tab.text("#announce") == "part.png: restored."
    assert tab.pixel(0.49, 0.5)[3] == 255
    requests = [event["request"]["url"] for event in tab.events("Network.requestWillBeSent")]
    assert len(requests) >= 4
    assert [url for url in requests if not url.startswith((served.url, f"blob:{served.url}", "data:"))] == []
    assert tab.complaints() == []


def test_what_is_downloaded_is_what_the_service_sent(tab: Any, served: Any, tmp_path: Path, part: Any) -> None:
    tab.restored(part(tmp_path, "tiff"))
    kept = tab.download("#download", tmp_path / "kept")
    assert (kept.name, kept.read_bytes()) == ("part.restored.tiff", served.image)
    report = tab.download("#download-report", tmp_path / "kept")
    told = json.loads(report.read_text())
    assert report.name == "part.report.json"
    assert told == {name: value for name, value in served.body.items() if name not in ("image", "defect_map")}


def test_the_white_level_that_is_offered_goes_to_the_service(tab: Any, served: Any, tmp_path: Path, part: Any) -> None:
    tab.restored(part(tmp_path, "tiff"))
    tab.click("#view-note button")
    tab.until("items[0].white === '4095' && items[0].state === 'done' && !$('view-note').innerText")
    assert served.queries[-1]["white_level"] == "4095"


def test_models_are_offered_and_the_chosen_one_is_asked_for(tab: Any, served: Any, tmp_path: Path, part: Any) -> None:
    tab.until("$('model').options.length === 3")
    offered = tab.value("[...$('model').options].map(o => o.textContent)")
    assert offered == ["unet@3, in service, production", "unet@2, candidate", "unet@1"]
    assert tab.value("$('model').value") == ""
    tab.value("$('model').value = 'unet@2'")
    tab.restored(part(tmp_path))
    assert served.queries[-1] == {"defect_map": "true", "model": "unet@2"}


def test_a_mask_goes_with_the_image(tab: Any, served: Any, tmp_path: Path, mask_file: Any, part: Any) -> None:
    (tmp_path / "mask.png").write_bytes(mask_file((60, 80)))
    served.without = ("defect_map",)
    tab.choose("#mask", tmp_path / "mask.png")
    tab.restored(part(tmp_path))
    assert served.masks == [True]
    assert "mask mask.png" in tab.text("#settings-told") and tab.text("#overlay-name") == "Your mask"
    tab.click("#mask-clear")
    tab.until("items[0].state === 'done'")
    assert served.masks == [True, False]


def test_a_problem_is_told_with_sentence_code_and_request(tab: Any, tmp_path: Path, part: Any) -> None:
    tab.value("$('white').value = '1023'")
    tab.choose("#file", part(tmp_path))
    tab.until("!$('problem').hidden")
    problem = tab.text("#problem")
    for told in (
        "above the white level 1023",
        "over_white_level",
        "5a5a-77",
        "Choose a higher white level under Settings",
    ):
        assert told in problem
    tab.value("$('white').value = ''")
    tab.click("#retry")
    tab.until("!$('work').hidden && $('problem').hidden")


def test_a_file_that_no_setting_helps_is_not_tried_again(tab: Any, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    tab.choose("#file", tmp_path / "a.png")
    tab.until("!$('problem').hidden")
    assert "unsupported_format" in tab.text("#problem") and tab.value("$('retry').hidden")


def test_a_key_is_asked_for_kept_for_the_tab_and_sent(tab: Any, served: Any, tmp_path: Path, part: Any) -> None:
    served.key = "sesame"
    tab.choose("#file", part(tmp_path))
    tab.until("!$('problem').hidden")
    assert "unauthorized" in tab.text("#problem")
    assert tab.value("document.activeElement.id") == "key"
    tab.send("Input.insertText", text="sesame")
    tab.press("Enter")
    tab.until("!$('work').hidden")
    tab.open(served.url)
    assert tab.value("$('key').value") == "sesame" and tab.value("localStorage.length") == 0


def test_a_page_behind_the_browsers_own_password_asks_for_no_key(
    tab: Any, served: Any, tmp_path: Path, part: Any
) -> None:
    served.password = "sesame"
    tab.sign_in(served.url, "sesame")
    tab.until("$('model').options.length === 3")
    tab.restored(part(tmp_path))
    assert "No alarm" in tab.text("#verdict")


def test_busy_is_waited_out_in_sight_three_times(tab: Any, served: Any, tmp_path: Path, part: Any) -> None:
    tab.value("window.told = new Set; new MutationObserver(() => told.add($('busy-told').textContent))"
              ".observe($('busy-told'), {childList: true})")  # fmt: skip
    busy, none = Refusal("overloaded", "32 requests wait"), Refusal("unavailable", "no replica")
    served.problems = [(busy, {"Retry-After": "1"}), (none, {"Retry-After": "0"})]
    tab.restored(part(tmp_path))
    assert tab.value("[...told]").count("Too many requests wait already. Next try in 1 s (1 of 3)") == 1
    served.problems = [(none, {"Retry-After": "0"})] * 4
    tab.click("#again")
    tab.until("!$('problem').hidden")
    assert "No replica\n" in tab.text("#problem") and served.problems == []


def test_a_request_is_cancelled(tab: Any, served: Any, tmp_path: Path, part: Any) -> None:
    served.problems = [(Refusal("overloaded", "busy"), {"Retry-After": "600"})]
    tab.choose("#file", part(tmp_path))
    tab.until("$('busy-told').innerText.includes('Next try in')")
    tab.click("#cancel")
    tab.until("$('busy').hidden && items[0].state === 'cancelled'")
    assert "Cancelled" in tab.text("#problem") and served.queries == []


def test_several_files_are_restored_and_each_has_its_state(tab: Any, served: Any, tmp_path: Path, part: Any) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    served.report = {"alarm": True, "reasons": ["structure was erased near (4, 5)"]}
    files = [part(tmp_path, "png", name="a"), tmp_path / "broken.png", part(tmp_path, "tiff", name="c")]
    tab.choose("#file", *files)
    tab.until("items.length === 3 && items.every(item => ['done', 'failed'].includes(item.state)) && !$('work').hidden")
    told = "! / a.png / restored, alarm / × / ✗ / broken.png / failed / × / ! / c.tiff / restored, alarm / ×"
    assert tab.text("#queue").replace("\n", " / ") == told
    assert "The alarm says: look at this image before you trust it" in tab.text("#verdict")
    assert "structure was erased near (4, 5)" in tab.text("#reasons")
    tab.click("#queue li:nth-child(2) .item")
    assert tab.value("$('work').hidden") and "undecodable" in tab.text("#problem")
    tab.click("#queue li:nth-child(2) .remove")
    assert tab.value("items.map(item => item.file.name)") == ["a.png", "c.tiff"]


def test_the_least_answer_is_enough(tab: Any, served: Any, tmp_path: Path, part: Any) -> None:
    served.without = ("defect_map", "input_sha256", "output_sha256", "timing_ms", "report", "request_id")
    tab.restored(part(tmp_path))
    assert "computed here" in tab.text("#report") and tab.value("$('overlay-row').hidden")
    assert hashlib.sha256(served.image).hexdigest() in tab.value("$('facts').textContent")
    assert tab.complaints() == []


def test_a_digest_that_differs_is_told(tab: Any, served: Any, tmp_path: Path, part: Any) -> None:
    tab.value("const real = answerOf; answerOf = (...all) => ({...real(...all), outputSha256: '0'.repeat(64)})")
    tab.restored(part(tmp_path))
    assert "✗ differs: ask for the image again" in tab.text("#report")


def test_the_sample_is_restored(tab: Any, served: Any) -> None:
    tab.click("#sample")
    tab.until("!$('work').hidden && view.size")
    assert served.masks == [True] and tab.value("view.size.width") == 320
