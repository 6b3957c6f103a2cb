// Files become pictures with the values that the file holds; what a browser would show of them is 8 bit and toned.

async function decodePicture(file) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  try {
    return await decodeBytes(bytes);
  } catch (error) {
    if (error instanceof CannotShow) throw error;
    throw new CannotShow("It cannot be read here: it may be damaged, cut off, or larger than this browser's memory.");
  }
}

async function decodeBytes(bytes) {
  const magic = String.fromCharCode(...bytes.subarray(0, 4));
  if (magic === "\x89PNG") return decodePng(bytes);
  if (["II*\0", "MM\0*", "II+\0", "MM\0+"].includes(magic)) return decodeTiff(bytes);
  if (magic.startsWith("\xff\xd8\xff")) return decodeNatively(plainJpeg(bytes), "image/jpeg");
  if (magic.startsWith("BM")) return decodeNatively(bytes, "image/bmp");
  throw new CannotShow("It is no PNG, TIFF, JPEG or BMP image.");
}

/** `size` bytes out of zlib data. */
async function inflate(parts, size) {
  const out = new Uint8Array(size);
  const reader = new Blob(parts).stream().pipeThrough(new DecompressionStream("deflate")).getReader();
  let filled = 0;
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      out.set(value.subarray(0, size - filled), filled);
      filled = Math.min(size, filled + value.length);
      await breathe();
    }
  } catch (error) {
    // Cameras pad their strips: what follows the data is an error to the stream, and none to us.
    if (filled < size) throw error;
  }
  if (filled < size) throw new CannotShow("Its compressed data is cut off.");
  return out;
}

const PNG_CHANNELS = { 0: 1, 2: 3, 4: 2, 6: 4 };

function pngParts(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const parts = [];
  for (let at = 8; at + 12 <= bytes.length; ) {
    const length = view.getUint32(at);
    const kind = String.fromCharCode(...bytes.subarray(at + 4, at + 8));
    if (kind === "IDAT") parts.push(bytes.subarray(at + 8, at + 8 + length));
    if (kind === "IEND") break;
    at += 12 + length;
  }
  const header = { width: view.getUint32(16), height: view.getUint32(20), bits: bytes[24], kind: bytes[25], interlaced: bytes[28] === 1 };
  return { ...header, parts };
}

/** PNG with true values; with alpha it has 2 or 4 channels, for whoever asks. */
async function decodePng(bytes) {
  const { width, height, bits, kind, interlaced, parts } = pngParts(bytes);
  const channels = PNG_CHANNELS[kind];
  checkSize(width, height, channels ?? 1);
  if (interlaced || !channels || bits < 8) return decodeNatively(bytes, "image/png");
  const step = (channels * bits) / 8;
  const row = width * step;
  const raw = await inflate(parts, height * (row + 1));
  const plain = new Uint8Array(height * row);
  for (let y = 0; y < height; y++) {
    unfilter(raw, y * (row + 1), plain, y * row, row, step);
    await breathe();
  }
  return { width, height, channels, bits, data: bits === 16 ? await samples16(plain, false) : plain, inverted: false };
}

function unfilter(raw, at, out, to, row, step) {
  const kind = raw[at++];
  const above = to ? out.subarray(to - row, to) : new Uint8Array(row);
  if (kind === 0) out.set(raw.subarray(at, at + row), to);
  else if (kind === 1) for (let i = 0; i < row; i++) out[to + i] = raw[at + i] + (i < step ? 0 : out[to + i - step]);
  else if (kind === 2) for (let i = 0; i < row; i++) out[to + i] = raw[at + i] + above[i];
  else if (kind === 3) for (let i = 0; i < row; i++) out[to + i] = raw[at + i] + (((i < step ? 0 : out[to + i - step]) + above[i]) >> 1);
  else if (kind === 4) {
    for (let i = 0; i < step; i++) out[to + i] = raw[at + i] + above[i];
    for (let i = step; i < row; i++) out[to + i] = raw[at + i] + paeth(out[to + i - step], above[i], above[i - step]);
  } else throw new CannotShow("Its PNG rows are damaged.");
}

function paeth(left, up, corner) {
  const a = Math.abs(up - corner);
  const b = Math.abs(left - corner);
  const c = Math.abs(left + up - 2 * corner);
  return a <= b && a <= c ? left : b <= c ? up : corner;
}

/** 16-bit values of bytes that are ours from here on: they are turned in place. Browsers run on little-endian machines. */
async function samples16(bytes, little) {
  const samples = new Uint16Array(bytes.buffer, bytes.byteOffset, bytes.length >> 1);
  for (let start = 0; !little && start < samples.length; start += 0x40000) {
    const stop = Math.min(samples.length, start + 0x40000);
    for (let i = start; i < stop; i++) samples[i] = (samples[i] << 8) | (samples[i] >> 8);
    await breathe();
  }
  return samples;
}

/** A JPEG without its orientation and colour profile: the service looks at neither, and pixels stay as stored. */
function plainJpeg(bytes) {
  const parts = [bytes.subarray(0, 2)];
  let at = 2;
  while (at + 4 <= bytes.length && bytes[at] === 0xff && bytes[at + 1] !== 0xda) {
    const end = at + 2 + ((bytes[at + 2] << 8) | bytes[at + 3]);
    if (bytes[at + 1] !== 0xe1 && bytes[at + 1] !== 0xe2) parts.push(bytes.subarray(at, end));
    at = end;
  }
  return new Blob([...parts, bytes.subarray(at)]);
}

/** What the browser itself can read: 8 bit. */
async function decodeNatively(bytes, type) {
  const bitmap = await createImageBitmap(new Blob([bytes], { type }), { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  const { width, height } = bitmap;
  checkSize(width, height, 3);
  const canvas = document.createElement("canvas");
  const band = Math.max(1, Math.min(height, Math.floor(4e6 / width)));
  canvas.width = width;
  canvas.height = band;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const data = new Uint8Array(width * height * 3);
  for (let top = 0, at = 0; top < height; top += band) {
    context.clearRect(0, 0, width, band);
    context.drawImage(bitmap, 0, -top);
    const rows = Math.min(band, height - top);
    const { data: pixels } = context.getImageData(0, 0, width, rows);
    for (let i = 0; i < pixels.length; i += 4) {
      data[at++] = pixels[i];
      data[at++] = pixels[i + 1];
      data[at++] = pixels[i + 2];
    }
    await breathe();
  }
  bitmap.close();
  const note = type === "image/png" ? "This PNG is shown as the browser reads it, with 8 bits." : "";
  return withoutEqualChannels({ width, height, channels: 3, bits: 8, data, inverted: false, note });
}

function withoutEqualChannels(picture) {
  const { data } = picture;
  for (let i = 0; i < data.length; i += 3) if (data[i] !== data[i + 1] || data[i] !== data[i + 2]) return picture;
  return { ...picture, channels: 1, data: data.filter((_, i) => i % 3 === 0) };
}

/** An 8-bit BMP, grey or RGB, since a canvas writes PNG with alpha, which the service refuses on purpose. */
function bmpFile({ width, height, channels, data }, name) {
  const row = Math.ceil((width * channels) / 4) * 4;
  const start = channels === 1 ? 1078 : 54;
  const view = new DataView(new ArrayBuffer(start + row * height));
  view.setUint16(0, 0x424d);
  view.setUint32(2, view.byteLength, true);
  view.setUint32(10, start, true);
  view.setUint32(14, 40, true);
  view.setInt32(18, width, true);
  view.setInt32(22, -height, true);
  view.setUint16(26, 1, true);
  view.setUint16(28, 8 * channels, true);
  if (channels === 1) for (let i = 0; i < 256; i++) view.setUint32(54 + 4 * i, i * 0x010101, true);
  for (let y = 0, at = 0; y < height; y++) {
    for (let x = 0; x < width; x++) for (let c = channels - 1; c >= 0; c--, at++) view.setUint8(start + y * row + x * channels + c, data[at]);
  }
  return new File([view.buffer], name, { type: "image/bmp" });
}

/** A pasted picture is a PNG with alpha whatever it was; where nothing shines through, it goes out as a BMP without. */
async function pastedFile(file) {
  if (file.type !== "image/png") return file;
  const picture = await decodePicture(file).catch(() => null);
  if (picture?.channels !== 4 || picture.bits !== 8) return file;
  const { width, height, data } = picture;
  const plain = new Uint8Array(width * height * 3);
  for (let from = 0, to = 0; from < data.length; from += 4, to += 3) {
    if (data[from + 3] !== 255) return file;
    plain.set(data.subarray(from, from + 3), to);
  }
  return bmpFile({ width, height, channels: 3, data: plain }, file.name.replace(/\.png$/i, "") + ".bmp");
}

/** An image with noise and two defects, and the mask of those. */
function sampleFiles() {
  const side = 320;
  let seed = 7;
  const random = () => (seed = (seed * 1664525 + 1013904223) >>> 0) / 2 ** 32;
  const grain = Array.from({ length: side }, () => 12 * (random() - 0.5));
  const scratch = (x, y) => Math.max(0, 1 - Math.abs(y - 90 - 0.55 * x - 7 * Math.sin(x / 23)) / 2.2) * (x > 60 && x < 250 ? 1 : 0);
  const pit = (x, y) => Math.max(0, 1 - Math.hypot(x - 225, y - 82) / 9);
  const defect = (x, y) => Math.max(scratch(x, y), pit(x, y));
  const noise = () => (random() + random() + random() - 1.5) * 44;
  const drawn = (level) => {
    const data = new Uint8Array(side * side);
    for (let i = 0; i < data.length; i++) data[i] = Math.max(0, Math.min(255, Math.round(level(i % side, Math.floor(i / side)))));
    return { width: side, height: side, channels: 1, data };
  };
  const mask = bmpFile(drawn((x, y) => (defect(x, y) > 0 ? 255 : 0)), "sample-mask.bmp");
  const surface = (x, y) => 150 + grain[y] + 22 * Math.sin((x + y) / 140) - 95 * defect(x, y) + noise();
  return { image: bmpFile(drawn(surface), "sample.bmp"), mask };
}
