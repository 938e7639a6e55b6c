package arka.conformance;

import com.fasterxml.jackson.core.JsonProcessingException;
import com.fasterxml.jackson.databind.JsonNode;
import com.fasterxml.jackson.databind.ObjectMapper;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.List;
import java.util.Map;

/**
 * Holds one stream's acks against the promises of protocol 3: each write gets one ack for each tier up to its
 * durability, in the order of the tiers; for each tier, sequences and LSNs increase. Not thread-safe.
 */
final class AckLedger {
  /** In the order in which a write reaches them. */
  static final List<String> TIERS = List.of("memory", "disk", "object_storage", "iceberg_committed");

  private static final ObjectMapper JSON = new ObjectMapper();

  private static final class Write {
    final List<String> expected;
    final long rows;
    long lsn;
    int reached;

    Write(List<String> expected, long rows) {
      this.expected = expected;
      this.rows = rows;
    }
  }

  private final List<Write> writes = new ArrayList<>();
  private final Map<String, Integer> lastSequence = new HashMap<>();
  private final Map<String, Long> lastLsn = new HashMap<>();
  private int received;

  /** Announces the stream's next write. */
  void expect(String durability, long rows) {
    writes.add(new Write(TIERS.subList(0, TIERS.indexOf(durability) + 1), rows));
  }

  int received() {
    return received;
  }

  /** Counts the acks that are still to come. */
  int outstanding() {
    return writes.stream().mapToInt(w -> w.expected.size() - w.reached).sum();
  }

  private static void check(boolean holds, String complaint, String ack) {
    if (!holds) {
      throw new AssertionError(complaint + ": " + ack);
    }
  }

  /** Checks one ack's JSON. */
  void take(String text) throws JsonProcessingException {
    JsonNode ack = JSON.readTree(text);
    check(ack.path("error").isNull() || ack.path("error").isMissingNode(), "error ack", text);
    int sequence = ack.path("sequence").asInt(-1);
    check(sequence >= 0 && sequence < writes.size(), "ack for a write that was never made", text);
    Write write = writes.get(sequence);
    check(write.reached < write.expected.size(), "one ack too many", text);
    String tier = ack.path("durability_level").asText();
    String next = write.expected.get(write.reached);
    check(tier.equals(next), "expected the ack for " + next, text);
    int before = lastSequence.getOrDefault(tier, -1);
    check(sequence > before, "sequence does not increase after " + before, text);
    long lsn = ack.path("lsn").asLong();
    long lsnBefore = lastLsn.getOrDefault(tier, 0L);
    check(lsn > lsnBefore, "LSN does not increase after " + lsnBefore, text);
    check(write.lsn == 0 || lsn == write.lsn, "the write had LSN " + write.lsn, text);
    check(ack.path("timestamp_us").asLong() > 0, "no timestamp", text);
    check(!ack.hasNonNull("rows") || ack.get("rows").asLong() == write.rows, "the write had " + write.rows + " rows", text);
    if (tier.equals("iceberg_committed")) {
      check(ack.path("snapshot_id").isTextual() && !ack.get("snapshot_id").asText().isEmpty(), "no snapshot_id", text);
    }
    write.lsn = lsn;
    write.reached++;
    lastSequence.put(tier, sequence);
    lastLsn.put(tier, lsn);
    received++;
  }
}
