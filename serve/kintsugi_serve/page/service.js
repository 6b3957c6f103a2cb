// Talks to the endpoint: key, models, one image at a time, and patience where it is asked for.
const TRIES_AGAIN = 3;
const KEPT_KEY = "kintsugi.key";
const ADVICE = {
  unauthorized: "Enter a key under Settings, then try again.",
  not_found: "Choose another model under Settings, then try again.",
  undecodable: "Export the image again and check that the file is whole.",
  over_white_level: "Choose a higher white level under Settings, or Automatic, then try again.",
  mismatch: "Choose a mask of the image's own width and height under Settings, then try again.",
  mask_required: "Choose a defect mask under Settings, then try again.",
  poison: "Do not send this file again; give the request id to the operator.",
  internal: "Give the request id to the operator.",
  store_failed: "Give the request id to the operator.",
  unreachable: "Check the connection, then try again.",
};
// The file itself is at fault, and no setting helps.
const LASTING = ["too_large", "unsupported_format", "unsupported_mode", "undecodable", "poison"];
const LATER = "Wait a moment, then try again.";

class Problem extends Error {
  constructor({ title, detail, code, status = 0, request_id = "" }, retryAfter = 1) {
    super(detail || title);
    Object.assign(this, { title, code, status, retryAfter, requestId: request_id });
    this.passes = status === 429 || status === 503;
    this.lasts = LASTING.includes(code);
    this.advice = ADVICE[code] ?? (this.passes ? LATER : "");
  }
}

const unreachable = (error) =>
  new Problem({ title: "The service did not answer", detail: `The browser says: ${error.message}.`, code: "unreachable" });

/** Seconds, from a number or a date. */
function secondsOf(header) {
  const seconds = Number(header ?? "1");
  const until = Number.isFinite(seconds) ? seconds : (Date.parse(header) - Date.now()) / 1000;
  return Number.isFinite(until) ? Math.max(0, Math.ceil(until)) : 1;
}

async function problemOf(answer) {
  const told = { title: "The service refused", detail: `It answered with status ${answer.status}.`, code: `http_${answer.status}`, status: answer.status };
  const body = await answer.json().catch(() => ({}));
  return new Problem({ request_id: answer.headers.get("x-request-id") ?? "", ...told, ...body }, secondsOf(answer.headers.get("retry-after")));
}

/** Waits so many seconds and tells each; ends at once, with the signal's error, if it is aborted. */
function countdown(seconds, signal, told) {
  const end = performance.now() + 1000 * seconds;
  return new Promise((resolve, reject) => {
    const look = () => {
      const left = Math.ceil((end - performance.now()) / 1000);
      if (left > 0 && !signal.aborted) return told(left);
      clearInterval(timer);
      if (signal.aborted) reject(signal.reason);
      else resolve();
    };
    const timer = setInterval(look, 250);
    signal.addEventListener("abort", look, { once: true });
    look();
  });
}

function bytesOfBase64(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  const raw = atob(text);
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return bytes;
}

/** SHA-256 in hex, or null where the browser has none to offer (a page over plain http). */
async function sha256(blob) {
  if (!globalThis.crypto?.subtle) return null;
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", await blob.arrayBuffer()));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function timingsOf(body, headers) {
  if (body.timing_ms) return body.timing_ms;
  const found = (headers.get("server-timing") ?? "").matchAll(/([\w-]+);dur=([\d.]+)/g);
  return Object.fromEntries(Array.from(found, ([, name, ms]) => [name, Number(ms)]));
}

/** What the panel and the viewer need, from the service's JSON; everything but the image may be absent. */
function answerOf(body, headers, wholeMs) {
  const { image, defect_map: map, ...told } = body;
  return {
    told,
    blob: new Blob([bytesOfBase64(image)], { type: `image/${body.format}` }),
    map: map ? new Blob([bytesOfBase64(map)], { type: "image/png" }) : null,
    format: body.format,
    report: body.report ?? {},
    requestId: body.request_id ?? headers.get("x-request-id") ?? "",
    inputSha256: body.input_sha256 ?? headers.get("x-kintsugi-input-sha256"),
    outputSha256: body.output_sha256 ?? headers.get("x-kintsugi-output-sha256"),
    timings: timingsOf(body, headers),
    wholeMs,
  };
}

class Service {
  constructor() {
    this.key = this.keptKey();
    // Sent without what the browser may know, for it would ask in its own dialog where the page can ask itself.
    this.credentials = "omit";
  }

  keptKey() {
    try {
      return sessionStorage.getItem(KEPT_KEY) ?? "";
    } catch {
      return "";
    }
  }

  setKey(key) {
    this.key = key;
    try {
      if (key) sessionStorage.setItem(KEPT_KEY, key);
      else sessionStorage.removeItem(KEPT_KEY);
    } catch {
      // Storage is switched off: the key lives as long as the page.
    }
  }

  fetch(path, options = {}) {
    const headers = { ...options.headers, ...(this.key && { Authorization: `Bearer ${this.key}` }) };
    return fetch(path, { ...options, headers, credentials: this.key ? "omit" : this.credentials });
  }

  async models() {
    let answer = await this.fetch("/v1/models");
    if (!answer.ok && !this.key && (await this.isPageGuarded())) {
      this.credentials = "same-origin";
      answer = await this.fetch("/v1/models");
    }
    if (!answer.ok) throw await problemOf(answer);
    return answer.json();
  }

  /** Whether the page itself needed what the browser holds: a password, or a cookie of a gateway. */
  async isPageGuarded() {
    const page = await fetch("/", { credentials: "omit", redirect: "manual" }).catch(() => null);
    return !page?.ok;
  }

  /** The answer to {file, mask, white, model}. `told` hears of every second of waiting. */
  async restore(job, signal, told) {
    for (let tries = 1; ; tries++) {
      try {
        return await this.restoreOnce(job, signal);
      } catch (problem) {
        if (!problem.passes || tries > TRIES_AGAIN) throw problem;
        await countdown(problem.retryAfter, signal, (left) => told(`${problem.title}. Next try in ${left} s (${tries} of ${TRIES_AGAIN})`));
        told("");
      }
    }
  }

  async restoreOnce(job, signal) {
    const query = new URLSearchParams({ defect_map: "true" });
    if (job.white) query.set("white_level", job.white);
    if (job.model) query.set("model", job.model);
    const headers = { Accept: "application/json" };
    let body = job.file;
    if (job.mask) {
      body = new FormData();
      body.append("image", job.file, job.file.name);
      body.append("mask", job.mask, job.mask.name);
    } else headers["Content-Type"] = job.file.type.startsWith("image/") ? job.file.type : "application/octet-stream";
    const started = performance.now();
    const sent = this.fetch(`/v1/restore?${query}`, { method: "POST", body, headers, signal });
    const answer = await sent.catch((error) => Promise.reject(signal.aborted ? error : unreachable(error)));
    if (!answer.ok) throw await problemOf(answer);
    const told = await answer.json().catch((error) => Promise.reject(signal.aborted ? error : unreachable(error)));
    return answerOf(told, answer.headers, performance.now() - started);
  }
}
