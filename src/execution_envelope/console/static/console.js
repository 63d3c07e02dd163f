// Live updates, copying, and a few keys. Everything works without it.
(() => {
  "use strict";
  const base = document.body.dataset.base;
  const status = document.getElementById("live");
  const say = (text) => { if (status.textContent !== text) status.textContent = text; };

  // Copying a command.
  const furnish = (root) => {
    if (!navigator.clipboard) return;
    for (const button of root.querySelectorAll("button.copy")) {
      button.hidden = false;
      button.addEventListener("click", async () => {
        try {
          await navigator.clipboard.writeText(button.parentElement.querySelector("code").textContent);
          button.textContent = "copied";
        } catch { button.textContent = "cannot copy"; }
        setTimeout(() => { button.textContent = "copy"; }, 1500);
      });
    }
  };
  furnish(document);

  // Keys: / to the query, j and k along the rows. Not while something is written.
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea")) return;
    if (event.key === "/") {
      const query = document.getElementById("q");
      if (query) { event.preventDefault(); query.focus(); }
    }
    if (event.key === "j" || event.key === "k") {
      const rows = [...document.querySelectorAll("a.row")];
      const at = rows.indexOf(document.activeElement);
      const next = rows[at < 0 ? 0 : at + (event.key === "j" ? 1 : -1)];
      if (next) { event.preventDefault(); next.focus(); }
    }
  });

  // Live updates: the stream says which envelopes changed; the regions that show them are read again.
  const regions = [...document.querySelectorAll("[data-live], [data-live-note]")];
  if (!regions.length || !window.EventSource) return;
  const shows = (region, ids) => {
    const what = region.dataset.live || region.dataset.liveNote;
    return ids === null || what === "all" || ids.includes(what);
  };
  let source = null, seen = document.body.dataset.after || "", failures = 0, tries = 0, retry = 0, planned = 0, readAt = 0, missed = false;

  const read = async () => {
    planned = 0;
    if (document.hidden) { missed = true; return; }
    const chosen = document.getSelection();
    if (chosen && !chosen.isCollapsed) { plan(); return; }  // somebody is marking text
    readAt = Date.now();
    try {
      const answer = await fetch(document.body.dataset.reads || location.href, { headers: { accept: "text/html" }, credentials: "same-origin" });
      if (!answer.ok || answer.redirected) throw new Error(String(answer.status));
      const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
      for (const old of document.querySelectorAll("[data-live-form]")) if (!fresh.getElementById(old.id)) old.remove();
      for (const old of document.querySelectorAll("[data-live]")) {
        const now = fresh.getElementById(old.id);
        if (!now || now.innerHTML === old.innerHTML) continue;
        const focused = old.contains(document.activeElement) ? document.activeElement : null;
        const place = focused && [...old.querySelectorAll("a, button, [tabindex]")].indexOf(focused);
        const href = focused && focused.getAttribute("href");
        const offsets = [...old.querySelectorAll(".scroll")].map((one) => one.scrollLeft);
        old.replaceChildren(...now.childNodes);
        furnish(old);
        old.querySelectorAll(".scroll").forEach((one, at) => { one.scrollLeft = offsets[at] || 0; });
        if (focused) {
          const all = [...old.querySelectorAll("a, button, [tabindex]")];
          const again = (href && all.find((one) => one.getAttribute("href") === href)) || all[place];
          if (again) again.focus({ preventScroll: true });
        }
      }
      failures = 0;
    } catch {
      failures += 1;
      plan();
    }
  };
  // At most one reading in 2 s, later and later while it fails, and never all readers at once.
  const plan = () => {
    if (planned) return;
    const wait = Math.max(2000 - (Date.now() - readAt), 0) + Math.min(60000, failures ? 1000 * 2 ** failures : 0);
    planned = setTimeout(read, wait + Math.random() * (500 + wait));
  };
  const changed = (ids) => {
    for (const region of regions) {
      if (!shows(region, ids)) continue;
      if (region.dataset.liveNote) region.hidden = false;
      else plan();
    }
  };
  const stop = () => { if (source) source.close(); source = null; clearTimeout(retry); retry = 0; };
  const start = () => {
    stop();
    source = new EventSource(`${base}/live${seen ? `?after=${encodeURIComponent(seen)}` : ""}`);
    const mine = source;
    let since = 0;
    source.addEventListener("open", () => { since = Date.now(); say("live"); });
    source.addEventListener("changed", (event) => {
      seen = event.lastEventId || seen;
      const said = JSON.parse(event.data);
      changed(said.many ? null : said.ids);
    });
    source.addEventListener("hello", (event) => { seen = event.lastEventId || seen; });
    source.addEventListener("error", () => {
      if (mine !== source) return;
      stop();
      const lasted = since && Date.now() - since > 10000;
      tries = lasted ? 0 : tries + 1;
      if (!lasted) say("not live: reload to see what is new");
      retry = setTimeout(start, Math.min(60000, 1000 * 2 ** tries) * (0.5 + Math.random()));
    });
  };
  // A page that nobody looks at holds no connection.
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) { stop(); say(""); return; }
    if (missed) { missed = false; plan(); }
    start();
  });
  if (!document.hidden) start();
})();
