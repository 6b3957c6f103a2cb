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
  let picked = null;

  const light = (trial) => marked.forEach((each) => each.classList.toggle("lit", each.dataset.trial === trial));

  const show = (mark, x, y) => {
    light(mark.dataset.trial);
    tip.textContent = mark.told + (pointer === "touch" ? "\ntap again to open" : "");
    tip.hidden = false;
    shown = mark.dataset.trial;
    const box = tip.getBoundingClientRect();
    const right = x + 18 + box.width < innerWidth - 8;
    const beside = right || x - 18 - box.width > 8;
    const left = right ? x + 18 : beside ? x - 18 - box.width : innerWidth - box.width - 8;
    const below = y + 18 + box.height < innerHeight - 8;
    const top = beside ? Math.min(y - box.height / 2, innerHeight - box.height - 8) : below ? y + 18 : y - 18 - box.height;
    tip.style.left = `${left}px`;
    tip.style.top = `${Math.max(8, top)}px`;
  };

  const hide = () => {
    tip.hidden = true;
    shown = null;
    light(picked);
  };

  const open = (mark) => {
    picked = mark.dataset.trial;
    hide();
    const figure = document.querySelector(mark.getAttribute("href"));
    const strip = figure && figure.closest(".strip");
    if (strip) strip.querySelector("input").checked = true;
  };

  addEventListener("pointerdown", (event) => {
    pointer = event.pointerType;
    if (event.target.closest("a[data-trial]")) return;
    if (event.target.closest("svg")) picked = null;
    hide();
  }, true);
  addEventListener("keydown", (event) => {
    pointer = "key";
    if (event.key !== "Escape") return;
    picked = null;
    hide();
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
