package interop

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/interop"
	testpb "google.golang.org/grpc/interop/grpc_testing"

	"github.com/reseal/reseal/integration/harness"
	"github.com/reseal/reseal/integration/peers"
	"github.com/reseal/reseal/integration/process"
)

// The suite ends its process when a case fails, so each case runs in a process
// of its own: this test's binary, with these variables.
const (
	grpcCaseVariable    = "RESEAL_GRPC_CASE"
	grpcAddressVariable = "RESEAL_GRPC_ADDRESS"
	grpcHostVariable    = "RESEAL_GRPC_HOST"
	grpcCAVariable      = "RESEAL_GRPC_CA"
)

// grpcCases are those that gRPC runs itself (interop/interop_test.sh of
// grpc-go), but for the two soaks. The rest need an account at Google, or, as
// pick_first_unary, a server that says which one it is, which grpc-go's does not.
var grpcCases = map[string]func(context.Context, *grpc.ClientConn){
	"empty_unary":                 unary(interop.DoEmptyUnaryCall),
	"large_unary":                 unary(interop.DoLargeUnaryCall),
	"client_streaming":            unary(interop.DoClientStreaming),
	"server_streaming":            unary(interop.DoServerStreaming),
	"ping_pong":                   unary(interop.DoPingPong),
	"empty_stream":                unary(interop.DoEmptyStream),
	"timeout_on_sleeping_server":  unary(interop.DoTimeoutOnSleepingServer),
	"cancel_after_begin":          unary(interop.DoCancelAfterBegin),
	"cancel_after_first_response": unary(interop.DoCancelAfterFirstResponse),
	"status_code_and_message":     unary(interop.DoStatusCodeAndMessage),
	"special_status_message":      unary(interop.DoSpecialStatusMessage),
	"custom_metadata":             unary(interop.DoCustomMetadata),
	"unimplemented_method":        interop.DoUnimplementedMethod,
	"unimplemented_service": func(ctx context.Context, conn *grpc.ClientConn) {
		interop.DoUnimplementedService(ctx, testpb.NewUnimplementedServiceClient(conn))
	},
	"orca_per_rpc": func(ctx context.Context, conn *grpc.ClientConn) {
		interop.DoORCAPerRPCTest(ctx, testpb.NewTestServiceClient(conn))
	},
	"orca_oob": func(ctx context.Context, conn *grpc.ClientConn) {
		interop.DoORCAOOBTest(ctx, testpb.NewTestServiceClient(conn))
	},
}

func unary(do func(context.Context, testpb.TestServiceClient, ...grpc.CallOption)) func(context.Context, *grpc.ClientConn) {
	return func(ctx context.Context, conn *grpc.ClientConn) { do(ctx, testpb.NewTestServiceClient(conn)) }
}

// grpcSoaks run until standard input ends. Each round is one of the suite's
// soaks: large unary calls, of which none may fail. channel_soak makes a
// connection for each. Streams go on meanwhile.
var grpcSoaks = map[string]func(context.Context, func() *grpc.ClientConn){
	"rpc_soak": func(ctx context.Context, dial func() *grpc.ClientConn) {
		conn := dial()
		defer conn.Close()
		soak(ctx, 100, func() (*grpc.ClientConn, func()) { return conn, func() {} })
	},
	"channel_soak": func(ctx context.Context, dial func() *grpc.ClientConn) {
		soak(ctx, 40, func() (*grpc.ClientConn, func()) {
			conn := dial()
			return conn, func() { _ = conn.Close() }
		})
	},
	"stream_soak": func(ctx context.Context, dial func() *grpc.ClientConn) {
		conn := dial()
		defer conn.Close()
		client := testpb.NewTestServiceClient(conn)
		for range 10 {
			interop.DoPingPong(ctx, client)
			interop.DoClientStreaming(ctx, client)
			interop.DoServerStreaming(ctx, client)
		}
	},
}

func soak(ctx context.Context, iterations int, channel func() (*grpc.ClientConn, func())) {
	interop.DoSoakTest(ctx, interop.SoakTestConfig{
		RequestSize: 271828, ResponseSize: 314159, NumWorkers: 4, Iterations: iterations,
		// Only what hangs is too late: the machine may be busy.
		PerIterationMaxAcceptableLatency: 20 * time.Second, OverallTimeout: time.Minute,
		ChannelForTest: channel,
	})
}

// grpcClient is the process of one case. It returns its exit code, unless the
// suite exits.
func grpcClient(name string) int {
	dial := func() *grpc.ClientConn {
		creds, err := credentials.NewClientTLSFromFile(os.Getenv(grpcCAVariable), os.Getenv(grpcHostVariable))
		if err != nil {
			panic(err)
		}
		conn, err := grpc.NewClient("passthrough:///"+os.Getenv(grpcAddressVariable), grpc.WithTransportCredentials(creds),
			// What orca_oob and orca_per_rpc need, and nobody else minds.
			grpc.WithDefaultServiceConfig(`{"loadBalancingConfig": [{"test_backend_metrics_load_balancer": {}}]}`))
		if err != nil {
			panic(err)
		}
		return conn
	}
	ctx := context.Background()
	if do := grpcCases[name]; do != nil {
		conn := dial()
		defer conn.Close()
		do(ctx, conn)
		return 0
	}
	over := make(chan struct{})
	go func() {
		defer close(over)
		_, _ = io.Copy(io.Discard, os.Stdin)
	}()
	for rounds := 1; ; rounds++ {
		grpcSoaks[name](ctx, dial)
		select {
		case <-over:
			fmt.Println("rounds:", rounds)
			return 0
		default:
		}
	}
}

// grpcServer starts the suite's server.
func (s *site) grpcServer(t *testing.T) *peers.Backend {
	t.Helper()
	output, err := exec.Command("go", "tool", "-n", "google.golang.org/grpc/interop/server").Output()
	if err != nil {
		t.Fatalf("building the server: %v", err)
	}
	pair, err := s.Authority.Issue(peers.ServerName)
	if err != nil {
		t.Fatal(err)
	}
	certificate, key, _, err := pair.Write(t.TempDir(), "server")
	if err != nil {
		t.Fatal(err)
	}
	address := s.Address()
	server, err := process.Start(process.Config{
		Name: "gRPC's interop server", Path: strings.TrimSpace(string(output)),
		Args: []string{"-use_tls", "-tls_cert_file", certificate, "-tls_key_file", key, "-port", port(t, address)},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		server.Kill()
		if t.Failed() {
			t.Logf("%s printed:\n%s", server.Name(), server.Output())
		}
	})
	if err := server.WaitReady(t.Context(), func(context.Context) error { return process.Listening(address) }); err != nil {
		t.Fatal(err)
	}
	return &peers.Backend{Name: "grpc", Address: address}
}

// grpcCommand is a client for a case.
func (s *site) grpcCommand(ctx context.Context, name, pool string) (command *exec.Cmd, output *bytes.Buffer) {
	command = exec.CommandContext(ctx, os.Args[0])
	// With the race detector a process would wait for a second before it exits.
	command.Env = append(os.Environ(), "GORACE=atexit_sleep_ms=0", grpcCaseVariable+"="+name, grpcAddressVariable+"="+s.address,
		grpcHostVariable+"="+host(pool), grpcCAVariable+"="+s.WriteFile(name+"-ca.pem", string(s.Authority.PEM())))
	output = new(bytes.Buffer)
	command.Stdout, command.Stderr = output, output
	return command, output
}

// TestGRPC runs gRPC's interoperability suite through an edge.
func TestGRPC(t *testing.T) {
	s := newSite(t, "")
	server := s.grpcServer(t)
	s.pool("grpc", []*peers.Backend{server}, "  protocol: http2\n")
	for _, name := range slices.Sorted(maps.Keys(grpcCases)) {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithDeadline(t.Context(), soon().Add(30*time.Second))
			defer cancel()
			command, output := s.grpcCommand(ctx, name, "grpc")
			if err := command.Run(); err != nil {
				t.Errorf("%v\n%s", err, output)
			}
		})
	}
	// The client's deadlines and cancels are no faults of the server.
	if stats := s.PoolStats("grpc"); stats.Errors != 0 {
		t.Errorf("the pool has errors: %v", stats.ErrorsByReason)
	}
}

// TestGRPCSoak runs the suite's soaks and its streams while the configuration
// changes. No call may fail.
func TestGRPCSoak(t *testing.T) {
	applies := 40
	if harness.Long() {
		applies = 100
	}
	s := newSite(t, "")
	servers := []*peers.Backend{s.grpcServer(t), s.grpcServer(t)}
	s.pool("grpc", servers, "  protocol: http2\n")

	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	var clients sync.WaitGroup
	var applied []io.Closer
	for name := range grpcSoaks {
		command, output := s.grpcCommand(ctx, name, "grpc")
		input, err := command.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := command.Start(); err != nil {
			t.Fatal(err)
		}
		applied = append(applied, input)
		clients.Go(func() {
			if err := command.Wait(); err != nil {
				t.Errorf("%s: %v\n%s", name, err, failures(output.String()))
				return
			}
			t.Logf("%s: %s", name, lastLine(output.String()))
		})
	}
	s.change(t, servers, applies)
	for _, input := range applied {
		_ = input.Close()
	}
	clients.Wait()
	if stats := s.PoolStats("grpc"); stats.Errors != 0 {
		t.Errorf("the pool has errors: %v", stats.ErrorsByReason)
	}
}

// change applies changes of all that a call depends on, one after the other, each
// in force before the next.
func (s *site) change(t *testing.T, servers []*peers.Backend, applies int) {
	t.Helper()
	other, err := peers.NewAuthority("another root")
	if err != nil {
		t.Fatal(err)
	}
	both := append(append([]byte{}, s.Authority.PEM()...), other.PEM()...)
	pool := func(servers []*peers.Backend, more string) string {
		return s.Pool("grpc", servers, "  protocol: http2\n"+more)
	}
	route := func(pool, more string) string { return harness.Route("grpc", "web", host("grpc"), pool, more) }
	web := func(more string) string { return harness.Listener("web", s.address, "", more) }
	for i := range applies {
		manifests := []string{
			pool(servers, fmt.Sprintf("  timeouts: {responseHeader: %ds}\n", 30+i)), // how requests are sent
			pool(servers[:1], ""), // an endpoint goes
			pool([]*peers.Backend{servers[1], servers[0]}, "  loadBalancing: {algorithm: round_robin}\n"), // and comes again
			// Another identity: all connections to backends are replaced.
			strings.Replace(pool(servers, ""), harness.Indent(s.Authority.PEM(), 8), harness.Indent(both, 8), 1),
			strings.Replace(pool(servers, ""), "name: grpc}", "name: grpc-2}", 1) + route("grpc-2", ""),      // where requests go
			route("grpc", fmt.Sprintf("  responseHeaders: {set: {X-Apply: \"%d\"}}\n", i)),                   // and what is added
			harness.Certificate("site", s.Issue()),                                                           // what clients see
			web(fmt.Sprintf("  limits: {maxConcurrentStreams: %d}\n  timeouts: {idle: %ds}\n", 100+i, 60+i)), // what clients may
		}
		revision := s.Apply(manifests[i%len(manifests)])
		s.WaitAcked(revision, s.edge)
	}
}

// failures are the lines of a client's output that don't say that all is well.
func failures(output string) string {
	var lines []string
	for line := range strings.Lines(output) {
		if !strings.HasSuffix(line, " succeeded\n") {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines, "")
}

func lastLine(output string) string {
	output = strings.TrimSpace(output)
	return output[strings.LastIndexByte(output, '\n')+1:]
}
