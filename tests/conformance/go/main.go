// Command conformance drives an Arka server with grpc-go and arrow-go's generated Flight stubs.
//
// It takes the server's host:port, then optionally the scenarios to run, and prints one line of JSON for
// each: {"scenario", "ok", "detail"}. It exits with 1 when one of them failed. What it expects is the wire
// contract (protocol 3 to 6); it knows nothing of the server's inside.
package main

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/apache/arrow-go/v18/arrow/flight"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// scenarioDeadline turns a hang into a failure that names its scenario.
const scenarioDeadline = 60 * time.Second

type scenario struct {
	name string
	// run returns a sentence for the report.
	run func(ctx context.Context, c *client) (string, error)
}

var scenarios = []scenario{
	{"create_table", createTable},
	{"one_row", oneRow},
	{"large", large},
	{"read_back", readBack},
	{"record_reader", recordReader},
	{"do_put", doPut},
	{"not_found", notFound},
	{"status_text", statusText},
	{"cancel", cancelMidStream},
	{"deadline", deadline},
	{"close_with_acks", closeWithAcks},
}

type report struct {
	Scenario string `json:"scenario"`
	OK       bool   `json:"ok"`
	Detail   string `json:"detail"`
}

// client is one channel, shared by the scenarios like an application's would be.
type client struct {
	address string
	// suffix makes this run's table names its own.
	suffix string
	flight flight.FlightServiceClient
}

func (c *client) table(name string) string { return "go_" + name + "_" + c.suffix }

// dial opens a channel with grpc-go's stock settings: 16 KiB frames, 64 KiB windows, messages up to 4 MiB in.
func dial(address string) (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(insecure.NewCredentials()))
}

func runOne(s scenario, c *client) report {
	ctx, cancel := context.WithTimeout(context.Background(), scenarioDeadline)
	defer cancel()
	started := time.Now()
	detail, err := s.run(ctx, c)
	if err != nil {
		return report{s.name, false, err.Error()}
	}
	return report{s.name, true, fmt.Sprintf("%s (%d ms)", detail, time.Since(started).Milliseconds())}
}

func run(arguments []string) (failed bool, err error) {
	if len(arguments) < 1 {
		return false, fmt.Errorf("usage: conformance HOST:PORT [SCENARIO...]")
	}
	channel, err := dial(arguments[0])
	if err != nil {
		return false, err
	}
	defer channel.Close()
	wanted := arguments[1:]
	for _, name := range wanted {
		if !slices.ContainsFunc(scenarios, func(s scenario) bool { return s.name == name }) {
			return false, fmt.Errorf("no scenario is called %q", name)
		}
	}
	c := &client{arguments[0], rand.Text()[:8], flight.NewFlightServiceClient(channel)}
	out := json.NewEncoder(os.Stdout)
	for _, s := range scenarios {
		if len(wanted) > 0 && !slices.Contains(wanted, s.name) {
			continue
		}
		line := runOne(s, c)
		failed = failed || !line.OK
		if err := out.Encode(line); err != nil {
			return failed, err
		}
	}
	return failed, nil
}

func main() {
	failed, err := run(os.Args[1:])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	if failed {
		os.Exit(1)
	}
}
