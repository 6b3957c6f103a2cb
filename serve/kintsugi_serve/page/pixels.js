"use strict";
// A picture is {width, height, channels: 1 or 3, bits: 8 or 16, data, inverted, note}; data holds values as the file does.
const MOST_SAMPLES = 120e6;

class CannotShow extends Error {}

const $ = (id) => document.getElementById(id);

/** Lets the page live for a moment, at most every 30 ms. */
const breathe = (() => {
  let last = 0;
  return async () => {
    if (performance.now() - last < 30) return;
    await new Promise((next) => setTimeout(next));
    last = performance.now();
  };
})();

function checkSize(width, height, channels) {
  if (!(width > 0 && height > 0)) throw new CannotShow("Its header holds no size.");
  if (width * height * channels <= MOST_SAMPLES) return;
  const size = `${width} × ${height} px`;
  throw new CannotShow(`${size} are too many to preview in a browser. The restored file is whole: download it.`);
}

const samplesFor = (bits, count) => (bits === 16 ? new Uint16Array(count) : new Uint8Array(count));

/** Half the width and height, each pixel the mean of four. */
async function halved(picture) {
  const { width, height, channels, data } = picture;
  const w = Math.ceil(width / 2);
  const h = Math.ceil(height / 2);
  const small = samplesFor(picture.bits, w * h * channels);
  for (let y = 0, at = 0; y < h; y++) {
    const top = 2 * y * width * channels;
    const below = Math.min(2 * y + 1, height - 1) * width * channels;
    for (let x = 0; x < w; x++) {
      const left = 2 * x * channels;
      const right = Math.min(2 * x + 1, width - 1) * channels;
      for (let c = 0; c < channels; c++, at++) {
        small[at] = (data[top + left + c] + data[top + right + c] + data[below + left + c] + data[below + right + c] + 2) >> 2;
      }
    }
    await breathe();
  }
  return { ...picture, width: w, height: h, data: small };
}

/** With the spread of its values, and smaller and smaller copies, for views that show more pixels than the screen has. */
async function prepared(picture) {
  const levels = [picture];
  while (Math.max(levels.at(-1).width, levels.at(-1).height) > 400) levels.push(await halved(levels.at(-1)));
  return { ...picture, levels, range: await spread(picture) };
}

async function histogram({ data, bits }) {
  const counts = new Uint32Array(2 ** bits);
  for (let start = 0; start < data.length; start += 0x40000) {
    const stop = Math.min(data.length, start + 0x40000);
    for (let i = start; i < stop; i++) counts[data[i]]++;
    await breathe();
  }
  return counts;
}

/** {low, high, highest}: the values that half a thousandth of the samples lie below and above, and the largest. */
async function spread(picture) {
  const counts = await histogram(picture);
  const rest = picture.data.length * 0.0005;
  const from = (start, step, most) => {
    let sum = 0;
    for (let value = start; value >= 0 && value < counts.length; value += step) {
      sum += counts[value];
      if (sum > most) return value;
    }
    return start;
  };
  const last = counts.length - 1;
  return { low: from(0, 1, rest), high: from(last, -1, rest), highest: from(last, -1, 0) };
}

const CAMERA_DEPTHS = [10, 12, 14];

/** The full scale that cameras have which holds `highest`, where 16-bit samples do not use all bits. */
function cameraLevel(bits, highest) {
  if (bits !== 16) return 255;
  const depth = CAMERA_DEPTHS.find((each) => highest < 2 ** each);
  return depth ? 2 ** depth - 1 : 65535;
}

/** Values of the pixel, as the file holds them. */
function valuesAt(picture, x, y) {
  const at = (y * picture.width + x) * picture.channels;
  return [...picture.data.subarray(at, at + picture.channels)];
}
