// The panel beside the image: what the service says of its own work.
const percent = (share, digits = 1) => (Number.isFinite(share) ? `${(100 * share).toFixed(digits)} %` : "not told");
const milliseconds = (ms) => (ms < 1000 ? `${ms.toFixed(ms < 10 ? 1 : 0)} ms` : `${(ms / 1000).toFixed(2)} s`);

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function entry(title, ...values) {
  return element("div", {}, element("dt", { textContent: title }), ...values.map((value) => element("dd", {}, value)));
}

function verdictOf(report) {
  if (report.abstained) return ["abstained", "–", "Left untouched: the model does not know such images"];
  if (report.alarm) return ["alarm", "!", "The alarm says: look at this image before you trust it"];
  return ["fine", "✓", "No alarm"];
}

function showVerdict(report) {
  const [kind, sign, words] = verdictOf(report);
  $("verdict").className = kind;
  $("verdict").querySelector(".sign").textContent = sign;
  $("verdict").querySelector("strong").textContent = words;
  const reasons = [report.abstained, ...(report.reasons ?? [])].filter(Boolean);
  $("reasons").replaceChildren(...reasons.map((reason) => element("li", { textContent: reason })));
  $("reasons").hidden = !reasons.length;
}

function figure(title, value, explained) {
  const made = entry(title, value);
  made.querySelector("dd").className = "big";
  if (explained) made.append(element("dd", { textContent: explained, className: "soft wide" }));
  return made;
}

function retention(report) {
  const made = figure("Defect retention", percent(report.retention), "structure of the original that is kept");
  if (!Number.isFinite(report.retention)) return made;
  const meter = element("meter", { min: 0, max: 1, low: 0.5, high: 0.8, optimum: 1, value: report.retention });
  meter.setAttribute("aria-label", "Defect retention");
  made.append(element("dd", { className: "wide" }, meter));
  return made;
}

function defects(map) {
  if (!map) return figure("Defects", "no map", "this model predicts none");
  return figure("Defect area", percent(map.area, 2), `of the pixels are defect to the model; it is at most ${percent(map.max, 0)} sure`);
}

function showFigures(report) {
  const made = [retention(report)];
  if ("local_retention" in report) made.push(figure("Retention, worst place", percent(report.local_retention), "the same, of the window that kept least"));
  made.push(figure("Added", percent(report.added, 2), "of the pixels hold structure that the original does not"));
  if ("removed" in report) made.push(figure("Erased", percent(report.removed, 2), "of the pixels lack structure of the original"));
  if ("defect_map" in report) made.push(defects(report.defect_map));
  $("figures").replaceChildren(...made);
}

async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const field = element("textarea", { value: text, className: "sr" });
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
    button.focus();
  }
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = "Copy"), 1500);
}

function copied(title, text, badge) {
  const button = element("button", { type: "button", textContent: "Copy", className: "small" });
  button.setAttribute("aria-label", `Copy: ${title}`);
  button.addEventListener("click", () => copy(text, button));
  const made = entry(title, element("code", { textContent: text, title: text }));
  made.querySelector("dd").append(button);
  made.className = "copied";
  if (badge) made.append(element("dd", {}, badge));
  return made;
}

/** A digest of the service's, and whether what arrived (or was sent) has it. */
function digest(title, said, computed) {
  const text = said ?? computed;
  if (!text) return entry(title, "not told");
  const [kind, words] = !said ? ["soft", "computed here"] : !computed ? ["soft", "not checked: this page needs https for it"]
    : said === computed ? ["good", "✓ verified"] : ["bad", "✗ differs: ask for the image again"];
  return copied(title, text, element("span", { className: kind, textContent: words }));
}

function timings(answer) {
  const parts = Object.entries(answer.timings).filter(([, ms]) => Number.isFinite(ms));
  const told = parts.map(([name, ms]) => `${name} ${milliseconds(ms)}`);
  const made = entry("Time", [...told, `with transfer ${milliseconds(answer.wholeMs)}`].join(" · "));
  const bar = element("div", { className: "timings", ariaHidden: "true" });
  parts.forEach(([, ms]) => {
    const part = element("span");
    part.style.flexGrow = ms;
    bar.append(part);
  });
  if (parts.length) made.append(element("dd", {}, bar));
  return made;
}

function showFacts(item) {
  const { answer } = item;
  const made = [copied("Model", `${answer.told.model}`, ""), copied("Model digest", answer.told.digest ?? "")];
  made.push(digest("Input SHA-256", answer.inputSha256, item.inputHash), digest("Output SHA-256", answer.outputSha256, item.outputHash));
  made.push(timings(answer), copied("Request", answer.requestId));
  $("facts").replaceChildren(...made);
}

function stemAndEnding(name, format) {
  const dot = name.lastIndexOf(".");
  const ending = { tiff: ".tif", jpeg: ".jpg" }[format] ?? `.${format}`;
  return dot > 0 ? [name.slice(0, dot), name.slice(dot)] : [name, ending];
}

function showDownloads(item, urls) {
  const [stem, ending] = stemAndEnding(item.file.name, item.answer.format);
  const told = new Blob([JSON.stringify(item.answer.told, null, 2)], { type: "application/json" });
  for (const [id, blob, name] of [["download", item.answer.blob, `${stem}.restored${ending}`], ["download-report", told, `${stem}.report.json`]]) {
    $(id).href = urls.of(blob);
    $(id).download = name;
  }
}

function showReport(item, urls) {
  showVerdict(item.answer.report);
  showFigures(item.answer.report);
  showFacts(item);
  showDownloads(item, urls);
}
