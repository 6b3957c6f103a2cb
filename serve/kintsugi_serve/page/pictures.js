// What of the selected image is on screen.
const MOST_FOR_THUMB = 48e6;

async function showPictures(item) {
  const run = ++shown;
  urls.drop();
  showReport(item, urls);
  view.show({});
  const mine = () => run === shown && item === selected;
  const [before, after, map] = await Promise.all([read(item.file), read(item.answer.blob), readMap(item)]);
  if (!mine()) return;
  const { width, height } = after.picture ?? {};
  const fits = (other) => (other?.width === width && other?.height === height ? other : null);
  const pictures = { before: fits(before.picture), after: after.picture ?? null, map: fits(map.picture) };
  $("noview").hidden = Boolean(pictures.after);
  $("view").hidden = $("tools").hidden = $("display").hidden = !pictures.after;
  for (const bar of document.querySelectorAll(".under")) bar.hidden = !pictures.after;
  if (!pictures.after) return tellNoView(after.why);
  $("view-note").replaceChildren(...notes(item, before, pictures));
  $("overlay-name").textContent = map.name;
  $("overlay-row").hidden = !pictures.map;
  for (const input of document.querySelectorAll("[name=mode]")) input.disabled = !pictures.before;
  startWindow(item, pictures);
  view.show(pictures);
  drawThumb(item.thumb, pictures.after, view.window);
}

async function read(blob) {
  try {
    const picture = await prepared(await decodePicture(blob));
    return { picture };
  } catch (error) {
    return { why: error.message };
  }
}

/** The defect map of the model, or else the mask that was sent, as 8 bit. */
async function readMap({ answer, mask }) {
  const blob = answer.map ?? mask;
  if (!blob) return { name: "" };
  const { picture } = await read(blob);
  const name = answer.map ? "Defect map" : "Your mask";
  if (!picture || answer.map) return { name, picture };
  const { width, height, channels, data } = picture;
  const flat = new Uint8Array(width * height);
  for (let i = 0; i < flat.length; i++) for (let c = 0; c < Math.min(3, channels); c++) if (data[i * channels + c]) flat[i] = 255;
  return { name, picture: await prepared({ width, height, channels: 1, bits: 8, data: flat }) };
}

function tellNoView(why) {
  $("noview").querySelector("strong").textContent = "Restored, but not shown";
  $("noview").querySelector("p").textContent = why;
}

function notes(item, before, { after }) {
  const found = [after.note, before.why && `The original cannot be shown: ${before.why}`].filter(Boolean).map((text) => element("span", { textContent: text }));
  const { highest } = (before.picture ?? after).range;
  const level = cameraLevel(after.bits, highest);
  if (item.white || level === 65535 || after.bits === 8) return found;
  const button = element("button", { type: "button", className: "small", textContent: `Restore with ${level}` });
  button.addEventListener("click", () => (setWhite(level), run(item)));
  const words = `The brightest pixel is ${highest} of 65535: the camera's white level may be ${level}, and the model should know. `;
  return [...found, element("span", {}, words, button)];
}

function startWindow(item, { before, after }) {
  const { range } = before ?? after;
  const most = 2 ** after.bits - 1;
  const shown = Number(item.white) || cameraLevel(after.bits, range.highest);
  view.limits = { most, full: Number(item.white) || most, range };
  for (const id of ["black", "bright"]) Object.assign($(id), { min: 0, max: shown, step: 1 });
  for (const id of ["black-value", "bright-value"]) Object.assign($(id), { min: 0, max: most, step: 1 });
  setWindow(0, shown);
}

function setWindow(black, white) {
  const { most } = view.limits;
  const low = Math.max(0, Math.min(most - 1, Math.round(black) || 0));
  const high = Math.max(low + 1, Math.min(most, Math.round(white) || 0));
  $("black").value = $("black-value").value = low;
  $("bright").value = $("bright-value").value = high;
  view.window = { black: low, white: high };
  view.refresh();
}

/** Small pictures of files that are not on screen, one after the other. */
let thumbs = Promise.resolve();
function thumbLater(item, blob) {
  if (blob.size > MOST_FOR_THUMB) return;
  thumbs = thumbs.then(async () => {
    const { picture } = await read(blob);
    if (picture) drawThumb(item.thumb, picture, { black: 0, white: cameraLevel(picture.bits, picture.range.highest) });
  });
}

function drawThumb(canvas, picture, shown) {
  const { width, height, data, channels, bits, inverted } = picture.levels.at(-1);
  const levels = displayLevels(bits, shown, inverted);
  const small = element("canvas", { width, height });
  const image = new ImageData(width, height);
  for (let i = 0; i < width * height; i++) {
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = levels[data[i * channels + (channels >= 3 ? c : 0)]];
    image.data[4 * i + 3] = 255;
  }
  small.getContext("2d").putImageData(image, 0, 0);
  const side = Math.min(width, height);
  canvas.getContext("2d").drawImage(small, (width - side) / 2, (height - side) / 2, side, side, 0, 0, canvas.width, canvas.height);
}

function tellView() {
  const { mode, pictures, original, split } = view;
  if (!view.size) {
    $("seam").hidden = $("label-left").hidden = $("label-right").hidden = true;
    $("readout").textContent = "Reading the pixels";
    return;
  }
  const side = mode === "side";
  const seam = mode === "slider" && pictures.before && !original;
  $("seam").hidden = !seam;
  const { top, bottom } = view.extent;
  Object.assign($("seam").style, { left: `${view.seamX}px`, top: `${top}px`, height: `${bottom - top}px` });
  $("seam").setAttribute("aria-valuenow", Math.round(split * 100));
  $("seam").setAttribute("aria-valuetext", `${Math.round(split * 100)} % original, ${100 - Math.round(split * 100)} % restored`);
  $("zoom-told").textContent = `${view.scale < 0.1 ? (view.scale * 100).toFixed(1) : Math.round(view.scale * 100)} %`;
  $("label-left").hidden = !(seam || side || original);
  $("label-right").hidden = original && !side;
  $("label-right").textContent = mode === "difference" ? "difference: gold brighter, blue darker" : original ? "original" : "restored";
  $("view").classList.toggle("stacked", side && view.pane.top > 0);
  $("view").classList.toggle("halved", side && view.pane.left > 0);
  $("view").classList.toggle("whole", view.scale <= view.fitting * 1.001);
  $("gain-row").hidden = mode !== "difference";
  $("readout").textContent = readout(view.cursor);
}

function readout(at) {
  if (!at) return "Point at the image to read its values";
  const { before, after, map } = view.pictures;
  const words = (values) => (values.length > 1 ? `(${values.join(", ")})` : `${values[0]}`);
  const now = valuesAt(after, at.x, at.y);
  const then = before && valuesAt(before, at.x, at.y);
  const change = then && now.map((value, i) => `${value >= then[i] ? "+" : "−"}${Math.abs(value - then[i])}`);
  const values = then ? `${words(then)} → ${words(now)}  ${words(change)}` : words(now);
  const defect = map ? `  defect ${(valuesAt(map, at.x, at.y)[0] / 255).toFixed(2)}` : "";
  return `x ${at.x}  y ${at.y}  ${values}${defect}`;
}
