// The part of TIFF that inspection images use: strips or tiles, grey or RGB of 8 or 16 bit.
const TIFF_TYPES = { 1: 1, 3: 2, 4: 4, 16: 8 };
const TIFF_CODECS = { 1: "none", 5: "LZW", 8: "deflate", 32946: "deflate", 32773: "PackBits" };
const TIFF_STRANGE = { 7: "JPEG", 50000: "Zstandard", 34887: "LERC", 34925: "LZMA", 50001: "WebP" };

/** Tags of the first page: number -> list of numbers. */
function tiffTags(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const little = bytes[0] === 0x49;
  const big = view.getUint16(2, little) === 43;
  const long = (at) => Number(view.getBigUint64(at, little));
  const read = { 1: (at) => view.getUint8(at), 2: (at) => view.getUint16(at, little), 4: (at) => view.getUint32(at, little), 8: long };
  const start = big ? long(8) : read[4](4);
  const count = big ? long(start) : read[2](start);
  const size = big ? 20 : 12;
  const tags = { little };
  for (let i = 0, at = start + (big ? 8 : 2); i < count; i++, at += size) {
    const wide = TIFF_TYPES[read[2](at + 2)];
    if (!wide) continue;
    const many = big ? long(at + 4) : read[4](at + 4);
    const inside = at + (big ? 12 : 8);
    const from = many * wide <= (big ? 8 : 4) ? inside : big ? long(inside) : read[4](inside);
    tags[read[2](at)] = Array.from({ length: many }, (_, n) => read[wide](from + n * wide));
  }
  return tags;
}

function tiffLayout(tags) {
  const one = (tag, otherwise) => tags[tag]?.[0] ?? otherwise;
  const channels = one(277, 1);
  const layout = {
    width: one(256, 0), height: one(257, 0), channels, bits: one(258, 1), little: tags.little,
    codec: TIFF_CODECS[one(259, 1)], predictor: one(317, 1), inverted: one(262, 1) === 0,
    planar: one(284, 1) === 2 && channels > 1,
    tiled: Boolean(tags[322]), offsets: tags[324] ?? tags[273], counts: tags[325] ?? tags[279],
  };
  checkSize(layout.width, layout.height, channels);
  if (!layout.codec) {
    const name = TIFF_STRANGE[one(259)] ?? `number ${one(259)}`;
    throw new CannotShow(`Its TIFF compression (${name}) cannot be read in a browser. The restored file is whole: download it.`);
  }
  const known = (channels === 1 || channels === 3) && (layout.bits === 8 || layout.bits === 16) && one(339, 1) === 1;
  if (!known || layout.predictor > 2 || one(266, 1) !== 1) throw new CannotShow("This kind of TIFF cannot be shown here.");
  layout.segmentWidth = layout.tiled ? one(322) : layout.width;
  layout.segmentHeight = layout.tiled ? one(323) : Math.min(one(278, layout.height), layout.height);
  return layout;
}

async function decodeTiff(bytes) {
  const layout = tiffLayout(tiffTags(bytes));
  const { width, height, channels, bits, segmentWidth, segmentHeight } = layout;
  const data = samplesFor(bits, width * height * channels);
  const across = Math.ceil(width / segmentWidth);
  const plane = across * Math.ceil(height / segmentHeight);
  const together = layout.planar ? 1 : channels;
  for (let i = 0; i < layout.offsets.length; i++) {
    const place = i % plane;
    const top = Math.floor(place / across) * segmentHeight;
    const rows = layout.tiled ? segmentHeight : Math.min(segmentHeight, height - top);
    const packed = bytes.subarray(layout.offsets[i], layout.offsets[i] + layout.counts[i]);
    const raw = await tiffSegment(layout.codec, packed, segmentWidth * rows * together * (bits / 8));
    const samples = layout.bits === 8 ? raw : await samples16(raw, layout.little);
    if (layout.predictor === 2) await undoDifferences(samples, segmentWidth * together, together);
    placeSegment(data, samples, layout, { left: (place % across) * segmentWidth, top, together, first: layout.planar ? Math.floor(i / plane) : 0 });
    await breathe();
  }
  return { width, height, channels, bits, data, inverted: layout.inverted };
}

async function tiffSegment(codec, packed, size) {
  if (codec === "deflate") return inflate([packed], size);
  if (codec === "LZW") return unpackLzw(packed, size);
  if (codec === "PackBits") return unpackBits(packed, size);
  const raw = new Uint8Array(size);
  raw.set(packed.subarray(0, size));
  return raw;
}

async function undoDifferences(samples, row, step) {
  for (let start = 0; start < samples.length; start += row) {
    for (let i = start + step; i < start + row; i++) samples[i] += samples[i - step];
    await breathe();
  }
}

function placeSegment(data, samples, layout, { left, top, together, first }) {
  const { width, height, channels, segmentWidth, segmentHeight } = layout;
  const columns = Math.min(segmentWidth, width - left);
  const rows = Math.min(segmentHeight, height - top);
  for (let y = 0; y < rows; y++) {
    const from = y * segmentWidth * together;
    const to = ((top + y) * width + left) * channels + first;
    if (together === channels) data.set(samples.subarray(from, from + columns * channels), to);
    else for (let x = 0; x < columns; x++) data[to + x * channels] = samples[from + x];
  }
}

function unpackBits(packed, size) {
  const out = new Uint8Array(size);
  for (let at = 0, to = 0; at < packed.length && to < size; ) {
    const head = (packed[at++] << 24) >> 24;
    if (head >= 0) {
      out.set(packed.subarray(at, at + Math.min(head + 1, size - to)), to);
      at += head + 1;
      to += head + 1;
    } else if (head !== -128) {
      out.fill(packed[at++], to, Math.min(size, to + 1 - head));
      to += 1 - head;
    }
  }
  return out;
}

/** TIFF's LZW: codes from the high bit on, which grow one code earlier than GIF's. */
async function unpackLzw(packed, size) {
  const out = new Uint8Array(size);
  // An entry is the output of an earlier code and the byte after it, so its place in the output is enough.
  const start = new Uint32Array(4098);
  const length = new Uint32Array(4098);
  let next = 258;
  let wide = 9;
  let held = 0;
  let bits = 0;
  for (let at = 0, to = 0, turn = 0; to < size; turn++) {
    if ((turn & 0xffff) === 0) await breathe();
    for (; bits < wide && at < packed.length; bits += 8) held = ((held << 8) | packed[at++]) & 0xffffff;
    if (bits < wide) break;
    bits -= wide;
    const code = (held >> bits) & ((1 << wide) - 1);
    if (code === 257) break;
    if (code === 256) {
      next = 258;
      wide = 9;
      continue;
    }
    const from = to;
    if (code < 256) out[to++] = code;
    else if (code < next) for (let i = 0; i < length[code]; i++) out[to++] = out[start[code] + i];
    else throw new CannotShow("Its LZW data is damaged.");
    if (next < 4097) {
      start[next] = from;
      length[next++] = to - from + 1;
    }
    if (next >= 1 << wide && wide < 12) wide++;
  }
  return out;
}
