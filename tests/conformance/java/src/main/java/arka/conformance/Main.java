package arka.conformance;

import com.fasterxml.jackson.databind.ObjectMapper;
import java.time.Duration;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.concurrent.ExecutionException;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.TimeoutException;

/**
 * Drives an Arka server with Arrow's stock Java Flight client (grpc-java on netty).
 *
 * <p>Takes the server's host:port, then optionally the scenarios to run, and prints one line of JSON for each:
 * {"scenario", "ok", "detail"}. Exits with 1 when one of them failed. What it expects is the wire contract
 * (protocol 3 to 6); it knows nothing of the server's inside.
 */
public final class Main {
  /** Turns a hang into a failure that names its scenario. */
  private static final Duration SCENARIO_DEADLINE = Duration.ofSeconds(60);

  private static final ObjectMapper JSON = new ObjectMapper();

  private Main() {}

  /** A scenario returns a sentence for the report. */
  @FunctionalInterface
  interface Scenario {
    String run() throws Exception;
  }

  private static Map<String, Scenario> scenarios(Scenarios s) {
    Map<String, Scenario> all = new LinkedHashMap<>();
    all.put("create_table", s::createTable);
    all.put("one_row", s::oneRow);
    all.put("large", s::large);
    all.put("read_back", s::readBack);
    all.put("do_put", s::doPut);
    all.put("not_found", s::notFound);
    all.put("status_text", s::statusText);
    all.put("cancel", s::cancel);
    all.put("deadline", s::deadline);
    all.put("close_with_acks", s::closeWithAcks);
    return all;
  }

  private static boolean runOne(ExecutorService threads, String name, Scenario scenario) throws Exception {
    long startedNs = System.nanoTime();
    Map<String, Object> line = new LinkedHashMap<>();
    line.put("scenario", name);
    Future<String> running = threads.submit(scenario::run);
    boolean ok = false;
    String detail;
    try {
      String said = running.get(SCENARIO_DEADLINE.toSeconds(), TimeUnit.SECONDS);
      detail = said + " (" + TimeUnit.NANOSECONDS.toMillis(System.nanoTime() - startedNs) + " ms)";
      ok = true;
    } catch (TimeoutException e) {
      running.cancel(true);
      detail = "not done after " + SCENARIO_DEADLINE.toSeconds() + " s";
    } catch (ExecutionException e) {
      detail = String.valueOf(e.getCause().getMessage() != null ? e.getCause().getMessage() : e.getCause());
    }
    line.put("ok", ok);
    line.put("detail", detail);
    System.out.println(JSON.writeValueAsString(line));
    return ok;
  }

  private static int run(List<String> arguments) throws Exception {
    if (arguments.isEmpty()) {
      System.err.println("usage: Main HOST:PORT [SCENARIO...]");
      return 2;
    }
    List<String> wanted = arguments.subList(1, arguments.size());
    boolean allOk = true;
    ExecutorService threads = Executors.newCachedThreadPool();
    Scenarios running = new Scenarios(arguments.get(0));
    Map<String, Scenario> all = scenarios(running);
    if (!all.keySet().containsAll(wanted)) {
      System.err.println("the scenarios are " + all.keySet());
      return 2;
    }
    for (Map.Entry<String, Scenario> entry : all.entrySet()) {
      if (wanted.isEmpty() || wanted.contains(entry.getKey())) {
        allOk &= runOne(threads, entry.getKey(), entry.getValue());
      }
    }
    if (allOk) {
      // A scenario that failed leaves buffers behind, and the complaint about them would hide its own.
      running.close();
    }
    return allOk ? 0 : 1;
  }

  public static void main(String[] arguments) {
    int status = 1;
    try {
      status = run(List.of(arguments));
    } catch (Exception e) {
      // Not a scenario's: above all the allocator's complaint about buffers that were never released.
      e.printStackTrace();
    }
    System.out.flush();
    System.err.flush();
    // A scenario that hangs must not keep the process alive.
    Runtime.getRuntime().halt(status);
  }
}
