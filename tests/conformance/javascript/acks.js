// In the order in which a write reaches them (protocol 3).
const TIERS = ['memory', 'disk', 'object_storage', 'iceberg_committed'];

function check(holds, complaint, ack) {
  if (!holds) throw new Error(`${complaint}: ${ack}`);
}

// Holds one stream's acks against the promises of protocol 3: each write gets one ack for each tier up to its
// durability, in the order of the tiers; for each tier, sequences and LSNs increase.
export class AckLedger {
  constructor() {
    this.writes = [];
    this.lastSequence = new Map();
    this.lastLsn = new Map();
    this.received = 0;
  }

  // Announces the stream's next write.
  expect(durability, rows) {
    const expected = TIERS.slice(0, TIERS.indexOf(durability) + 1);
    this.writes.push({ expected, rows, lsn: null, reached: 0 });
  }

  // How many acks are still to come.
  get outstanding() {
    return this.writes.reduce((total, write) => total + write.expected.length - write.reached, 0);
  }

  // Checks one ack's JSON.
  take(text) {
    const ack = JSON.parse(text);
    const { lsn, sequence, durability_level: tier } = ack;
    check(ack.error == null, 'error ack', text);
    check(Number.isSafeInteger(lsn) && lsn > 0, 'no LSN below 2^53', text);
    const write = this.writes[sequence];
    check(write !== undefined, 'ack for a write that was never made', text);
    check(write.reached < write.expected.length, 'one ack too many', text);
    check(tier === write.expected[write.reached], `expected the ack for ${write.expected[write.reached]}`, text);
    const sequenceBefore = this.lastSequence.get(tier) ?? -1;
    check(sequence > sequenceBefore, `sequence does not increase after ${sequenceBefore}`, text);
    const lsnBefore = this.lastLsn.get(tier) ?? 0;
    check(lsn > lsnBefore, `LSN does not increase after ${lsnBefore}`, text);
    check(write.lsn === null || lsn === write.lsn, `the write had LSN ${write.lsn}`, text);
    check(ack.timestamp_us > 0, 'no timestamp', text);
    check(ack.rows == null || ack.rows === write.rows, `the write had ${write.rows} rows`, text);
    // A string, since snapshot ids exceed what a JavaScript number holds.
    if (tier === 'iceberg_committed') check(/^\d+$/.test(ack.snapshot_id), 'no snapshot_id', text);
    write.lsn = lsn;
    write.reached += 1;
    this.lastSequence.set(tier, sequence);
    this.lastLsn.set(tier, lsn);
    this.received += 1;
  }
}
