// After a click on a personal link in a mail or a chat, the browser keeps the new cookie to itself for one navigation
// (SameSite=Strict), so the server sees a stranger and answers with this page. Requests of the page itself carry the
// cookie: who is signed in goes on to the work.

import { openSession } from "./api.js";

const TRIED = "collect-landing";

function alreadyTried() {
  try {
    const last = Number(sessionStorage.getItem(TRIED) ?? 0);
    sessionStorage.setItem(TRIED, String(Date.now()));
    return Date.now() - last < 5000; // never in circles
  } catch {
    return true; // storage is turned off: the link on the page still leads on
  }
}

if (location.pathname !== "/" && !alreadyTried()) {
  openSession().then(
    (session) => location.replace(session.role === "admin" && location.pathname !== "/judge" ? "/admin" : "/judge"),
    () => {}, // not signed in: the page says what to do
  );
}
