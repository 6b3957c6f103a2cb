// Draws what is visible of a picture before and after, at any scale; coordinates of the screen are in CSS pixels.
const STEPS = [1 / 16, 1 / 8, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64];
const opaque = (red, green, blue) => ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0;

class View {
  constructor(canvas, changed) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.changed = changed;
    this.layers = {};
    this.stale = new Set();
    this.mode = "slider";
    this.split = 0.5;
    this.gain = 8;
    this.opacity = 0.6;
    this.overlay = false;
    this.original = false;
    this.cursor = null;
    this.pictures = {};
    this.frame = 0;
  }

  get size() {
    return this.pictures.after ?? this.pictures.before ?? null;
  }

  /** Pictures with levels, each may be null: before, after, and map, the 8-bit defect map. */
  show(pictures) {
    this.pictures = pictures;
    this.cursor = null;
    const { width, height } = this.size ?? {};
    if (width && (this.last?.width !== width || this.last?.height !== height)) this.start();
    if (width) this.last = { width, height };
    this.refresh();
  }

  /** The part of the canvas that one picture has. */
  get pane() {
    const { width, height } = this.room;
    if (this.mode !== "side") return { width, height, left: 0, top: 0 };
    const stacked = width < 520;
    return stacked ? { width, height: height / 2, left: 0, top: height / 2 } : { width: width / 2, height, left: width / 2, top: 0 };
  }

  get room() {
    return { width: this.canvas.clientWidth, height: this.canvas.clientHeight };
  }

  get fitting() {
    const { width, height } = this.pane;
    return Math.min(width / this.size.width, height / this.size.height);
  }

  start() {
    this.scale = Math.min(1, this.fitting);
    this.centre();
  }

  fit() {
    this.scale = Math.min(this.fitting, STEPS.at(-1));
    this.centre();
    this.refresh();
  }

  centre() {
    this.x = this.size.width / 2;
    this.y = this.size.height / 2;
  }

  /** Where on the screen the picture's pixel (0, 0) begins. */
  get origin() {
    const { width, height } = this.pane;
    return { x: Math.round(width / 2 - this.x * this.scale), y: Math.round(height / 2 - this.y * this.scale) };
  }

  /** The visible part of the picture, on the screen. */
  get extent() {
    const { width, height } = this.pane;
    const { x, y } = this.origin;
    const right = Math.min(width, x + this.size.width * this.scale);
    const bottom = Math.min(height, y + this.size.height * this.scale);
    return { left: Math.max(0, x), top: Math.max(0, y), right, bottom };
  }

  /** The pixel under a point of the screen, or null outside the picture. */
  pixelAt(x, y) {
    const { left, top, width, height } = this.pane;
    const inX = x >= left && x < left + width ? x - left : x;
    const inY = y >= top && y < top + height ? y - top : y;
    const found = { x: Math.floor((inX - this.origin.x) / this.scale), y: Math.floor((inY - this.origin.y) / this.scale) };
    return this.holds(found) ? found : null;
  }

  holds({ x, y }) {
    return x >= 0 && y >= 0 && x < this.size.width && y < this.size.height;
  }

  /** Zoom so that the point of the screen (the middle of the view by default) keeps its pixel. */
  zoomTo(scale, x = this.pane.width / 2, y = this.pane.height / 2) {
    const wanted = Math.max(Math.min(this.fitting, STEPS[0]), Math.min(STEPS.at(-1), scale));
    const { width, height, left, top } = this.pane;
    const fromX = (x >= left && left ? x - left : x) - width / 2;
    const fromY = (y >= top && top ? y - top : y) - height / 2;
    this.x += fromX / this.scale - fromX / wanted;
    this.y += fromY / this.scale - fromY / wanted;
    this.scale = wanted;
    this.clamp();
    this.refresh();
  }

  zoomStep(direction) {
    const near = this.scale * (1 + direction * 0.01);
    const next = direction > 0 ? STEPS.find((step) => step > near) : STEPS.findLast((step) => step < near);
    this.zoomTo(next ?? this.scale);
  }

  pan(dx, dy) {
    this.x -= dx / this.scale;
    this.y -= dy / this.scale;
    this.clamp();
    this.refresh();
  }

  /** A picture smaller than the view stays in its middle, a larger one covers it. */
  clamp() {
    const { width, height } = this.pane;
    const held = (value, whole, shown) => (shown >= whole ? whole / 2 : Math.max(shown / 2, Math.min(whole - shown / 2, value)));
    this.x = held(this.x, this.size.width, width / this.scale);
    this.y = held(this.y, this.size.height, height / this.scale);
  }

  moveCursor(dx, dy) {
    const from = this.cursor ?? { x: Math.floor(this.x) - dx, y: Math.floor(this.y) - dy };
    this.cursor = {
      x: Math.max(0, Math.min(this.size.width - 1, from.x + dx)),
      y: Math.max(0, Math.min(this.size.height - 1, from.y + dy)),
    };
    this.follow();
    this.draw();
  }

  follow() {
    const { width, height } = this.pane;
    const x = this.origin.x + this.cursor.x * this.scale;
    const y = this.origin.y + this.cursor.y * this.scale;
    const beyond = (at, most) => (at < 0 ? -at + most / 4 : at + this.scale > most ? most - at - this.scale - most / 4 : 0);
    const dx = beyond(x, width);
    const dy = beyond(y, height);
    if (dx || dy) this.pan(dx, dy);
  }

  set(values) {
    Object.assign(this, values);
    this.refresh();
  }

  /** Draw again without a new look at the pixels. */
  move(values) {
    Object.assign(this, values);
    this.draw();
  }

  refresh() {
    this.stale = new Set(["before", "after", "difference", "map"]);
    this.draw();
  }

  draw() {
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = 0;
      if (this.room.width) this.paint();
      this.changed(this);
    });
  }

  paint() {
    const ratio = devicePixelRatio || 1;
    const { width, height } = this.room;
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(height * ratio);
    if (!this.size) return;
    const { left, top } = this.pane;
    const shown = this.pictures.before && (this.original || !this.pictures.after) ? "before" : "after";
    if (this.mode === "difference" && !this.original) this.place("difference", 0, 0);
    else if (this.mode === "side") {
      this.place("before", 0, 0);
      this.place(this.original ? "before" : "after", left, top);
    } else this.place(shown, 0, 0);
    if (this.mode === "slider" && !this.original && this.pictures.before) this.place("before", 0, 0, this.seamX);
    if (this.overlay && !this.original) this.place("map", left, top);
    this.paintLines(ratio);
  }

  get seamX() {
    const { left, right } = this.extent;
    return left + (right - left) * this.split;
  }

  place(name, left, top, width = this.pane.width) {
    const ratio = devicePixelRatio || 1;
    const layer = this.layer(name);
    const w = Math.round(width * ratio);
    if (!layer || !w) return;
    this.context.globalAlpha = name === "map" ? this.opacity : 1;
    this.context.drawImage(layer, 0, 0, w, layer.height, Math.round(left * ratio), Math.round(top * ratio), w, layer.height);
    this.context.globalAlpha = 1;
  }

  paintLines(ratio) {
    const { left, top, width, height } = this.pane;
    this.context.setTransform(ratio, 0, 0, ratio, 0, 0);
    this.context.fillStyle = "#d9a441";
    if (left) this.context.fillRect(left - 1, 0, 2, height);
    if (top) this.context.fillRect(0, top - 1, width, 2);
    if (!this.cursor) return;
    const side = Math.max(this.scale, 7);
    const middle = (at) => (at + 0.5) * this.scale - side / 2;
    for (const [x, y] of left || top ? [[0, 0], [left, top]] : [[0, 0]]) {
      const at = [x + this.origin.x + middle(this.cursor.x) - 0.5, y + this.origin.y + middle(this.cursor.y) - 0.5, side + 1, side + 1];
      for (const [colour, wide] of [["#000", 3], ["#ffd27a", 1.5]]) {
        this.context.strokeStyle = colour;
        this.context.lineWidth = wide;
        this.context.strokeRect(...at);
      }
    }
  }

  /** What is visible of a picture, as a canvas of the pane's size; drawn anew only when it is stale. */
  layer(name) {
    const needed = name === "difference" ? this.pictures.before && this.pictures.after : this.pictures[name];
    if (!needed) return null;
    if (!this.stale.has(name)) return this.layers[name];
    this.stale.delete(name);
    const ratio = devicePixelRatio || 1;
    const canvas = (this.layers[name] ??= document.createElement("canvas"));
    canvas.width = Math.max(1, Math.round(this.pane.width * ratio));
    canvas.height = Math.max(1, Math.round(this.pane.height * ratio));
    const context = canvas.getContext("2d");
    const image = context.createImageData(canvas.width, canvas.height);
    const pixels = new Uint32Array(image.data.buffer);
    const level = Math.max(0, Math.min(this.size.levels.length - 1, Math.round(Math.log2(1 / (this.scale * ratio)))));
    const grid = this.grid(level, canvas, ratio);
    if (name === "difference") paintDifference(pixels, grid, this.pictures.before.levels[level], this.pictures.after.levels[level], this);
    else if (name === "map") paintGrey(pixels, grid, needed.levels[level], mapColours());
    else paintPicture(pixels, grid, needed.levels[level], this.window);
    context.putImageData(image, 0, 0);
    return canvas;
  }

  /** Which column and row of the level each column and row of the canvas shows; -1 outside. */
  grid(level, canvas, ratio) {
    const size = this.size.levels[level];
    const line = (length, origin, whole, most) =>
      Int32Array.from({ length }, (_, i) => {
        const at = Math.floor(((i + 0.5) / ratio - origin) / this.scale);
        return at < 0 || at >= whole ? -1 : Math.min(at >> level, most - 1);
      });
    return {
      columns: line(canvas.width, this.origin.x, this.size.width, size.width),
      rows: line(canvas.height, this.origin.y, this.size.height, size.height),
    };
  }
}

function eachPixel({ columns, rows }, width, put) {
  for (let j = 0, to = 0; j < rows.length; j++) {
    const row = rows[j] * width;
    for (let i = 0; i < columns.length; i++, to++) if (row >= 0 && columns[i] >= 0) put(to, row + columns[i]);
  }
}

/** Value -> 0..255, black to white of the display; a negative is turned. */
function displayLevels(bits, { black, white }, inverted) {
  const levels = new Uint8ClampedArray(2 ** bits);
  const share = 255 / Math.max(1, white - black);
  for (let value = 0; value < levels.length; value++) levels[value] = (value - black) * share;
  return inverted ? levels.map((level) => 255 - level) : levels;
}

function paintPicture(pixels, grid, picture, window) {
  const levels = displayLevels(picture.bits, window, picture.inverted);
  const { data, width } = picture;
  if (picture.channels === 1) paintGrey(pixels, grid, picture, Uint32Array.from(levels, (level) => opaque(level, level, level)));
  else eachPixel(grid, width, (to, from) => (pixels[to] = opaque(levels[data[3 * from]], levels[data[3 * from + 1]], levels[data[3 * from + 2]])));
}

function paintGrey(pixels, grid, { data, width }, colours) {
  eachPixel(grid, width, (to, from) => (pixels[to] = colours[data[from]]));
}

const mapColours = () => Uint32Array.from({ length: 256 }, (_, value) => ((value << 24) | (0x8a << 16) | (0x2b << 8) | 0xff) >>> 0);

/** Gold where the restored image is brighter, blue where it is darker, black where they agree. */
function paintDifference(pixels, grid, before, after, { gain, window }) {
  const share = (gain * 255) / Math.max(1, window.white - window.black) / before.channels;
  const sign = before.inverted ? -1 : 1;
  const shade = (level) => {
    const v = Math.max(-1, Math.min(1, level / 255));
    return v >= 0 ? opaque(255 * v, 196 * v, 84 * v) : opaque(-70 * v, -160 * v, -255 * v);
  };
  const colours = Uint32Array.from({ length: 511 }, (_, i) => shade(i - 255));
  const { channels, width } = before;
  eachPixel(grid, width, (to, from) => {
    let sum = 0;
    for (let c = 0, at = from * channels; c < channels; c++, at++) sum += after.data[at] - before.data[at];
    pixels[to] = colours[255 + Math.round(Math.max(-255, Math.min(255, sum * sign * share)))];
  });
}
