// Pointer, wheel and keys on the image.
const HANDLE = 22;

class Stage {
  constructor(view, said) {
    this.view = view;
    this.said = said;
    this.pointers = new Map();
    this.area = $("view");
    this.area.addEventListener("pointerdown", (event) => this.down(event));
    this.area.addEventListener("pointermove", (event) => this.moved(event));
    for (const name of ["pointerup", "pointercancel"]) this.area.addEventListener(name, (event) => this.up(event));
    this.area.addEventListener("pointerleave", () => this.pointers.size || this.point(null));
    this.area.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    this.area.addEventListener("keydown", (event) => this.key(event));
    this.area.addEventListener("keyup", (event) => event.key === " " && this.original(false));
    this.area.addEventListener("blur", () => this.original(false));
    $("seam").addEventListener("keydown", (event) => this.seamKey(event));
    this.holdButton();
    new ResizeObserver(() => this.resized()).observe(this.area);
  }

  resized() {
    if (!this.view.size) return;
    if (!this.view.scale) this.view.start();
    this.view.clamp();
    this.view.refresh();
  }

  holdButton() {
    const hold = $("hold");
    hold.addEventListener("pointerdown", () => this.original(true));
    for (const name of ["pointerup", "pointerleave", "pointercancel", "blur"]) hold.addEventListener(name, () => this.original(false));
    const held = (event) => event.key === " " || event.key === "Enter";
    hold.addEventListener("keydown", (event) => held(event) && (event.preventDefault(), this.original(true)));
    hold.addEventListener("keyup", (event) => held(event) && this.original(false));
    hold.addEventListener("contextmenu", (event) => event.preventDefault());
  }

  original(shown) {
    if (this.view.original !== shown) this.view.move({ original: shown });
  }

  place(event) {
    const box = this.area.getBoundingClientRect();
    return { x: event.clientX - box.left - this.area.clientLeft, y: event.clientY - box.top - this.area.clientTop };
  }

  down(event) {
    if (!this.view.size || event.button > 0) return;
    const at = this.place(event);
    this.pointers.set(event.pointerId, at);
    this.area.setPointerCapture(event.pointerId);
    const near = Math.abs(at.x - this.view.seamX) < HANDLE;
    this.sliding = this.pointers.size === 1 && this.view.mode === "slider" && near && !$("seam").hidden;
    this.area.classList.toggle("grabbed", !this.sliding);
    if (event.pointerType === "touch") this.point(at);
  }

  moved(event) {
    if (!this.view.size) return;
    const at = this.place(event);
    const last = this.pointers.get(event.pointerId);
    if (!last) return this.point(at);
    if (this.pointers.size === 2) this.pinch(event.pointerId, last, at);
    else if (this.sliding) this.slideTo(at.x);
    else this.view.pan(at.x - last.x, at.y - last.y);
    this.pointers.set(event.pointerId, at);
    if (this.pointers.size === 1 && this.sliding) this.point(at);
  }

  pinch(id, last, at) {
    const [other] = [...this.pointers].filter(([key]) => key !== id).map(([, place]) => place);
    const away = (place) => Math.hypot(place.x - other.x, place.y - other.y);
    this.sliding = false;
    this.view.zoomTo((this.view.scale * away(at)) / Math.max(1, away(last)), (at.x + other.x) / 2, (at.y + other.y) / 2);
    this.view.pan((at.x - last.x) / 2, (at.y - last.y) / 2);
  }

  up(event) {
    this.pointers.delete(event.pointerId);
    this.sliding = false;
    this.area.classList.remove("grabbed");
  }

  wheel(event) {
    if (!this.view.size) return;
    event.preventDefault();
    const { x, y } = this.place(event);
    const lines = event.deltaMode === 1 ? 30 : 1;
    this.view.zoomTo(this.view.scale * 2 ** ((-event.deltaY * lines) / (event.ctrlKey ? 100 : 300)), x, y);
  }

  point(at) {
    $("readout").setAttribute("aria-live", "off");
    this.view.move({ cursor: at && this.view.pixelAt(at.x, at.y) });
  }

  slideTo(x) {
    const { left, right } = this.view.extent;
    this.split((x - left) / Math.max(1, right - left));
  }

  split(share) {
    this.view.move({ split: Math.max(0, Math.min(1, share)) });
  }

  seamKey(event) {
    const now = this.view.split;
    const steps = { ArrowLeft: now - 0.01, ArrowDown: now - 0.01, ArrowRight: now + 0.01, ArrowUp: now + 0.01, PageDown: now - 0.1, PageUp: now + 0.1, Home: 0, End: 1 };
    if (event.shiftKey || !(event.key in steps)) return;
    event.preventDefault();
    event.stopPropagation();
    this.split(Math.round(steps[event.key] * 100) / 100);
  }

  key(event) {
    if (!this.view.size || event.ctrlKey || event.metaKey || event.altKey) return;
    const arrow = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    const acts = {
      "+": () => this.zoomStep(1), "=": () => this.zoomStep(1), "-": () => this.zoomStep(-1), "0": () => this.view.fit(),
      "1": () => this.view.zoomTo(1), " ": () => this.original(true), d: () => this.toggleMap(), D: () => this.toggleMap(),
    };
    const act = arrow ? () => this.arrow(arrow, event.shiftKey) : acts[event.key];
    if (!act) return;
    event.preventDefault();
    act();
  }

  zoomStep(direction) {
    this.view.zoomStep(direction);
    if (this.view.cursor) this.view.follow();
  }

  arrow([dx, dy], shifted) {
    if (shifted) return this.view.pan(-dx * 40, -dy * 40);
    $("readout").setAttribute("aria-live", "polite");
    this.view.moveCursor(dx, dy);
  }

  toggleMap() {
    if (!$("overlay-row").hidden) $("overlay").click();
  }
}
