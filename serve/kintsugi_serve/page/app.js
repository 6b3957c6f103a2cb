// The queue of images, the settings, and what of it is on screen.
const AT_ONCE = 2;
const WORDS = { waiting: "waiting", sending: "restoring", failed: "failed", cancelled: "cancelled", done: "restored", alarm: "restored, alarm" };
const SIGNS = { waiting: "…", sending: "", failed: "✗", cancelled: "–", done: "✓", alarm: "!" };

const service = new Service();
const items = [];
const urls = {
  held: [],
  of(blob) {
    this.held.push(URL.createObjectURL(blob));
    return this.held.at(-1);
  },
  drop() {
    this.held.splice(0).forEach((url) => URL.revokeObjectURL(url));
  },
};
let selected = null;
let nextMask = null;
let shown = 0;

const view = new View($("canvas"), tellView);
const stage = new Stage(view);
const announce = (words) => ($("announce").textContent = words);

/* Settings */

const whiteLevel = () => ($("white").value === "other" ? $("white-other").value : $("white").value);
const maskOfNow = () => (selected ? selected.mask : nextMask);

function tellSettings() {
  const white = whiteLevel();
  const chosen = $("model").selectedOptions[0]?.textContent ?? "";
  const mask = maskOfNow();
  $("settings-told").textContent = [chosen, white ? `white level ${white}` : "white level automatic", mask ? `mask ${mask.name}` : "no mask"].join(" · ");
  $("mask-label").textContent = mask ? mask.name : "Choose a mask";
  $("mask-caption").querySelector("small").textContent = selected ? `of ${selected.file.name}` : "optional";
  $("mask-clear").hidden = !mask;
  $("white-other").hidden = $("white").value !== "other";
}

function setMask(file) {
  if (selected) selected.mask = file;
  else nextMask = file;
  tellSettings();
  if (selected?.answer || selected?.problem) run(selected);
}

function setWhite(level) {
  const known = [...$("white").options].some((option) => option.value === String(level));
  $("white").value = known ? String(level) : "other";
  $("white-other").value = known ? "" : level;
  tellSettings();
}

async function askService() {
  try {
    const answer = await service.fetch("/readyz");
    const body = await answer.json();
    $("service").className = `chip ${answer.ok ? "up" : "down"}`;
    $("service").textContent = answer.ok ? body.model : "no model is ready";
  } catch {
    $("service").className = "chip down";
    $("service").textContent = "no answer";
  }
}

async function askModels() {
  try {
    showModels(await service.models());
    return true;
  } catch (error) {
    if (error.status === 401) $("settings").open = true;
    return false;
  } finally {
    tellSettings();
  }
}

function showModels({ serving, published = [], refused }) {
  const now = serving ? `${serving.name}@${serving.version}` : "";
  const options = [element("option", { value: "", textContent: now ? `${now}, in service` : "the one in service" })];
  for (const { name, versions = [], aliases = {} } of published) {
    for (const { version } of [...versions].reverse()) {
      const label = `${name}@${version}`;
      const also = Object.entries(aliases).filter(([, number]) => number === version).map(([alias]) => alias);
      if (label === now) options[0].textContent = [label, "in service", ...also].join(", ");
      else options.push(element("option", { value: label, textContent: [label, ...also].join(", ") }));
    }
  }
  const before = $("model").value;
  $("model").replaceChildren(...options);
  $("model").value = options.some((option) => option.value === before) ? before : "";
  $("refused").hidden = !refused;
  $("refused").textContent = refused ? `The service did not take ${refused.model}: ${refused.detail}` : "";
}

/* Queue */

function add(files) {
  const made = [...files].map((file, i) => newItem(file, i === 0 ? nextMask : null));
  if (!made.length) return;
  nextMask = null;
  items.push(...made);
  $("settings").open = false;
  select(made[0]);
  made.forEach((item) => thumbLater(item, item.file));
  next();
}

function newItem(file, mask) {
  const item = { file, mask, state: "waiting", told: "", controller: null, answer: null, problem: null };
  item.sign = element("span", { className: "sign", ariaHidden: "true" });
  item.thumb = element("canvas", { width: 88, height: 88 });
  item.thumb.setAttribute("aria-hidden", "true");
  item.words = element("small");
  const name = element("span", { className: "file", textContent: file.name });
  item.button = element("button", { type: "button", className: "item", title: file.name }, item.thumb, item.sign, element("span", { className: "told" }, name, item.words));
  item.button.addEventListener("click", () => select(item));
  item.remove = element("button", { type: "button", className: "remove", textContent: "×" });
  item.remove.setAttribute("aria-label", `Remove ${file.name}`);
  item.remove.addEventListener("click", () => remove(item));
  item.row = element("li", {}, item.button, item.remove);
  $("queue").querySelector("ul").append(item.row);
  return item;
}

function remove(item) {
  item.controller?.abort();
  const at = items.indexOf(item);
  items.splice(at, 1);
  item.row.remove();
  const other = items[Math.min(at, items.length - 1)];
  if (item === selected) select(other ?? null);
  (other?.remove ?? $("file")).focus();
  next();
}

function change(item, values) {
  Object.assign(item, values);
  showQueue();
  if (item === selected) showState();
}

const stateOf = (item) => (item.state === "done" && item.answer.report.alarm ? "alarm" : item.state);

function showQueue() {
  $("queue").hidden = !items.length;
  for (const item of items) {
    const state = stateOf(item);
    item.row.className = state;
    item.sign.textContent = SIGNS[state];
    item.words.textContent = WORDS[state];
    item.button.setAttribute("aria-current", String(item === selected));
  }
}

function next() {
  const busy = items.filter((item) => item.state === "sending").length;
  items.filter((item) => item.state === "waiting").slice(0, Math.max(0, AT_ONCE - busy)).forEach(run);
}

async function run(item) {
  item.controller?.abort();
  const controller = new AbortController();
  change(item, { controller, state: "sending", started: performance.now(), told: "", problem: null });
  const job = { file: item.file, mask: item.mask, white: whiteLevel(), model: $("model").value };
  try {
    const answer = await service.restore(job, controller.signal, (told) => change(item, { told }));
    const [inputHash, outputHash] = await Promise.all([sha256(item.file), sha256(answer.blob)]);
    if (item.controller !== controller) return;
    change(item, { answer, inputHash, outputHash, white: job.white, state: "done" });
    announce(`${item.file.name}: ${WORDS[stateOf(item)]}.`);
    if (item === selected) await showPictures(item);
    else thumbLater(item, answer.blob);
  } catch (error) {
    if (item.controller === controller) failed(item, error, controller.signal.aborted);
  } finally {
    next();
    askService();
  }
}

function failed(item, error, aborted) {
  if (aborted) change(item, { state: item.answer ? "done" : "cancelled" });
  else if (error instanceof Problem) change(item, { state: "failed", problem: error, answer: null });
  else change(item, { state: "failed", answer: null, problem: unreachable(error) });
  announce(`${item.file.name}: ${WORDS[item.state]}.`);
  if (error.status !== 401) return;
  $("settings").open = true;
  if (item === selected) $("key").focus();
}

function select(item) {
  selected = item;
  tellSettings();
  showQueue();
  showState();
  if (item?.answer) showPictures(item);
  else view.show({});
}

function showState() {
  const item = selected;
  $("busy").hidden = !["waiting", "sending"].includes(item?.state);
  $("busy-told").textContent = item?.told || `${item?.state === "waiting" ? "Waiting: " : "Restoring "}${item?.file.name}`;
  $("problem").hidden = !item?.problem && item?.state !== "cancelled";
  $("work").hidden = !item?.answer;
  $("top").classList.toggle("working", items.length > 0);
  $("drop").querySelector("strong").textContent = items.length ? "Drop, paste or choose more" : "Drop inspection images here";
  if (!$("problem").hidden) showProblem(item);
}

function showProblem({ problem, file }) {
  $("problem").querySelector("h2").textContent = problem ? problem.title : "Cancelled";
  $("problem-detail").textContent = problem ? problem.message : `${file.name} was not restored.`;
  $("problem-advice").textContent = problem?.advice ?? "";
  $("retry").hidden = problem?.lasts ?? false;
  $("problem").querySelector("small").textContent = problem ? [problem.code, problem.requestId && `request ${problem.requestId}`].filter(Boolean).join(" · ") : "";
}

/* Wiring */

const taken = (input) => {
  const files = [...input.files];
  input.value = "";
  return files;
};
$("file").addEventListener("change", (event) => add(taken(event.target)));
$("mask").addEventListener("change", (event) => setMask(taken(event.target)[0] ?? null));
$("mask-clear").addEventListener("click", () => (setMask(null), $("mask").focus()));
$("sample").addEventListener("click", () => {
  const { image, mask } = sampleFiles();
  selected = null;
  nextMask = mask;
  add([image]);
});
for (const id of ["white", "white-other", "model"]) $(id).addEventListener("change", tellSettings);
$("key").value = service.key;
$("key").addEventListener("change", async () => {
  service.setKey($("key").value.trim());
  if (await askModels()) items.filter((item) => item.problem?.status === 401).forEach(run);
});
for (const id of ["again", "retry"]) $(id).addEventListener("click", () => selected && run(selected));
$("cancel").addEventListener("click", () => {
  const { state, controller } = selected;
  if (state === "waiting") change(selected, { state: "cancelled" });
  else controller.abort();
});
for (const input of document.querySelectorAll("[name=mode]")) input.addEventListener("change", () => {
  view.mode = input.value;
  view.clamp();
  view.refresh();
});
$("zoom-in").addEventListener("click", () => stage.zoomStep(1));
$("zoom-out").addEventListener("click", () => stage.zoomStep(-1));
$("zoom-fit").addEventListener("click", () => view.fit());
$("zoom-one").addEventListener("click", () => view.zoomTo(1));
for (const [id, event] of [["black", "input"], ["black-value", "change"]]) $(id).addEventListener(event, () => setWindow($(id).valueAsNumber, view.window.white));
for (const [id, event] of [["bright", "input"], ["bright-value", "change"]]) $(id).addEventListener(event, () => setWindow(view.window.black, $(id).valueAsNumber));
$("window-fit").addEventListener("click", () => setWindow(view.limits.range.low, view.limits.range.high));
$("window-full").addEventListener("click", () => setWindow(0, view.limits.full));
$("gain").addEventListener("input", () => {
  view.set({ gain: 2 ** $("gain").valueAsNumber });
  $("gain-told").textContent = `${view.gain} ×`;
});
$("overlay").addEventListener("change", () => view.move({ overlay: $("overlay").checked }));
$("opacity").addEventListener("input", () => view.move({ opacity: $("opacity").valueAsNumber / 100 }));
const dragged = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
addEventListener("dragover", (event) => dragged(event) && (event.preventDefault(), $("drop").classList.add("over")));
addEventListener("dragleave", (event) => event.relatedTarget || $("drop").classList.remove("over"));
addEventListener("drop", (event) => {
  if (!dragged(event)) return;
  event.preventDefault();
  $("drop").classList.remove("over");
  add(event.dataTransfer.files);
});
addEventListener("paste", async (event) => {
  const files = [...event.clipboardData.files];
  if (files.length) add(await Promise.all(files.map(pastedFile)));
});
/** The mark of the page as its icon, drawn here since the page may load nothing. */
function showIcon() {
  const canvas = element("canvas", { width: 64, height: 64 });
  const context = canvas.getContext("2d");
  context.scale(2, 2);
  context.lineJoin = "round";
  for (const [path, colour, wide] of [["M4 11h24c0 9-5 15-12 15S4 20 4 11Z", "#8d8474", 3], ["m18 11-3 5 3.5 3-3 7", "#d9a441", 3]]) {
    Object.assign(context, { strokeStyle: colour, lineWidth: wide });
    context.stroke(new Path2D(path));
  }
  document.head.append(element("link", { rel: "icon", href: canvas.toDataURL() }));
}

showIcon();
$("settings").open = innerWidth > 900;
tellSettings();
askService();
askModels();
