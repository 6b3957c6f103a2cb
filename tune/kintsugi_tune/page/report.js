"use strict";
// Without this script every mark is still a link with a title.
(() => {
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  document.body.append(tip);
  const marked = [...document.querySelectorAll("[data-trial]")];
  let pointer = "mouse";
  let shown = null;

  const light = (trial) => marked.forEach((each) => each.classList.toggle("lit", each.dataset.trial === trial));

  const show = (mark, x, y) => {
    light(mark.dataset.trial);
    tip.textContent = mark.told + (pointer === "touch" ? "\ntap again to open" : "");
    tip.hidden = false;
    shown = mark.dataset.trial;
    const box = tip.getBoundingClientRect();
    const left = x + 18 + box.width < innerWidth ? x + 18 : Math.max(8, x - 18 - box.width);
    const top = Math.min(Math.max(8, y - box.height / 2), innerHeight - box.height - 8);
    tip.style.left = `${Math.max(8, Math.min(left, innerWidth - box.width - 8))}px`;
    tip.style.top = `${Math.max(8, top)}px`;
  };

  const hide = () => {
    tip.hidden = true;
    shown = null;
    light(null);
  };

  const open = (mark) => {
    hide();
    light(mark.dataset.trial);
    const figure = document.querySelector(mark.getAttribute("href"));
    const strip = figure && figure.closest(".strip");
    if (strip) strip.querySelector("input").checked = true;
  };

  addEventListener("pointerdown", (event) => {
    pointer = event.pointerType;
    if (!event.target.closest("a[data-trial]")) hide();
  }, true);
  addEventListener("keydown", (event) => {
    pointer = "key";
    if (event.key === "Escape") hide();
  });
  addEventListener("scroll", () => { if (pointer !== "key") { tip.hidden = true; shown = null; } }, { passive: true });

  for (const mark of document.querySelectorAll("a[data-trial]")) {
    const title = mark.querySelector("title");
    mark.told = title.textContent;
    mark.setAttribute("aria-label", mark.told);
    title.remove();
    mark.addEventListener("mousemove", (event) => { if (pointer !== "touch") show(mark, event.clientX, event.clientY); });
    mark.addEventListener("mouseenter", () => { if (pointer === "key") pointer = "mouse"; });
    mark.addEventListener("mouseleave", () => { if (pointer !== "touch") hide(); });
    mark.addEventListener("focus", () => {
      if (!mark.matches(":focus-visible")) return;
      const box = mark.getBoundingClientRect();
      show(mark, box.right - 10, box.top + box.height / 2);
    });
    mark.addEventListener("blur", () => { if (pointer === "key") hide(); });
    mark.addEventListener("click", (event) => {
      if (pointer === "touch" && shown !== mark.dataset.trial) {
        event.preventDefault();
        show(mark, event.clientX, event.clientY);
      } else open(mark);
    });
  }
})();
