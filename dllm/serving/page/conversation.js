// What was asked and answered, for each of the two settings.

export class Conversation {
  turns = [];

  // `answers` are views, one for each setting that was asked.
  add(asked, answers) {
    this.turns.push({ asked, answers });
  }

  // The messages of a chat that goes on with `asked`. A setting that was not there yet goes on from the first one's
  // answers; questions without an answer are left out.
  messages(side, asked) {
    const before = this.turns.flatMap((turn) => {
      const content = (turn.answers[side] ?? turn.answers[0]).text;
      return content ? [{ role: "user", content: turn.asked }, { role: "assistant", content }] : [];
    });
    return [...before, { role: "user", content: asked }];
  }
}
