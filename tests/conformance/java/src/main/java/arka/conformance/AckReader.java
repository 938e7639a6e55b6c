package arka.conformance;

import java.nio.charset.StandardCharsets;
import java.util.concurrent.TimeUnit;
import java.util.function.BooleanSupplier;
import org.apache.arrow.memory.ArrowBuf;

/** Reads a stream's acks in a thread of its own while the caller writes. */
final class AckReader {
  /** Longer than any scenario may take: the scenario's own deadline ends a wait. */
  private static final long WAIT_MS = TimeUnit.MINUTES.toMillis(2);

  /** Returns the next ack's JSON, null at the stream's end; throws the stream's status. */
  @FunctionalInterface
  interface Source {
    String receive() throws Exception;
  }

  private final AckLedger ledger = new AckLedger();
  private Throwable failure;
  private boolean ended;

  AckReader(Source source) {
    Thread thread = new Thread(() -> read(source), "acks");
    thread.setDaemon(true);
    thread.start();
  }

  static String text(ArrowBuf metadata) {
    byte[] bytes = new byte[(int) metadata.readableBytes()];
    metadata.getBytes(metadata.readerIndex(), bytes);
    return new String(bytes, StandardCharsets.UTF_8);
  }

  private void read(Source source) {
    Throwable thrown = null;
    try {
      for (String ack = source.receive(); ack != null; ack = source.receive()) {
        synchronized (this) {
          ledger.take(ack);
          notifyAll();
        }
      }
    } catch (Exception | AssertionError e) {
      thrown = e;
    }
    synchronized (this) {
      failure = thrown;
      ended = true;
      notifyAll();
    }
  }

  /** Announces a write; to be called before the write is sent. */
  synchronized void expect(String durability, long rows) {
    ledger.expect(durability, rows);
  }

  synchronized int received() {
    return ledger.received();
  }

  synchronized int outstanding() {
    return ledger.outstanding();
  }

  private String counts() {
    return ledger.received() + " acks came, " + ledger.outstanding() + " did not";
  }

  private synchronized void waitUntil(BooleanSupplier condition) throws InterruptedException {
    long endNs = System.nanoTime() + TimeUnit.MILLISECONDS.toNanos(WAIT_MS);
    while (!condition.getAsBoolean()) {
      long leftMs = TimeUnit.NANOSECONDS.toMillis(endNs - System.nanoTime());
      if (leftMs <= 0) {
        throw new AssertionError("waited in vain: " + counts());
      }
      wait(leftMs);
    }
  }

  /** Returns when so many acks have come, before the stream's end. */
  synchronized void waitAcks(int count) throws Exception {
    waitUntil(() -> ended || ledger.received() >= count);
    if (ledger.received() < count) {
      throw new AssertionError("the stream ended before ack " + count + ", " + counts() + ": " + failure, failure);
    }
  }

  /** Returns when the stream has ended with OK and each write has had all its acks. */
  synchronized void waitEnd() throws Exception {
    waitUntil(() -> ended);
    if (failure != null) {
      throw new AssertionError("the stream failed, " + counts() + ": " + failure, failure);
    }
    if (ledger.outstanding() > 0) {
      throw new AssertionError("the stream ended with OK: " + counts());
    }
  }

  /** Returns what ended the stream: null for OK. */
  synchronized Throwable waitFailure() throws Exception {
    waitUntil(() -> ended);
    return failure;
  }
}
