package tally

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/reseal/reseal/edge/exchange"
	edgetally "github.com/reseal/reseal/edge/tally"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// plane is a control plane that is nothing but a tally.
type plane struct {
	t        *testing.T
	server   *Server
	registry *prometheus.Registry
	pipe     *bufconn.Listener
	stop     func()

	mu   sync.Mutex
	live []string
}

const edgeHeader = "test-edge" // stands for the certificate

func startPlane(t *testing.T) *plane {
	t.Helper()
	p := &plane{t: t, registry: prometheus.NewRegistry(), pipe: bufconn.Listen(1 << 20)}
	p.server = New(Config{
		Edge: func(ctx context.Context) (string, error) {
			headers, _ := metadata.FromIncomingContext(ctx)
			if ids := headers.Get(edgeHeader); len(ids) > 0 {
				return ids[0], nil
			}
			return "", errors.New("no certificate")
		},
		Live: func() []string {
			p.mu.Lock()
			defer p.mu.Unlock()
			return slices.Clone(p.live)
		},
		Logger:     slog.New(slog.NewTextHandler(io.Discard, nil)),
		Registerer: p.registry,
	})
	server := grpc.NewServer()
	resealv1.RegisterTallyServiceServer(server, p.server)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 2)
	go func() { ended <- p.server.Run(ctx) }()
	go func() { ended <- server.Serve(p.pipe) }()
	p.stop = sync.OnceFunc(func() {
		cancel()
		server.GracefulStop()
		for range 2 {
			if err := <-ended; err != nil {
				t.Errorf("the plane ended with %v", err)
			}
		}
	})
	t.Cleanup(p.stop)
	return p
}

func (p *plane) client(id string) resealv1.TallyServiceClient {
	p.t.Helper()
	conn, err := grpc.NewClient("passthrough:///plane",
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return p.pipe.DialContext(ctx) }),
		grpc.WithStreamInterceptor(func(ctx context.Context, desc *grpc.StreamDesc, conn *grpc.ClientConn, method string, streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
			return streamer(metadata.AppendToOutgoingContext(ctx, edgeHeader, id), desc, conn, method, opts...)
		}))
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { conn.Close() })
	return resealv1.NewTallyServiceClient(conn)
}

// node is an edge that is nothing but a tally.
type node struct {
	*edgetally.Tally
	stop func()
}

func (p *plane) node(id, bootID string) *node {
	p.t.Helper()
	n := &node{Tally: edgetally.New(nil)}
	reporter := edgetally.NewReporter(edgetally.ReporterConfig{
		Edge: id, BootID: bootID, Tally: n.Tally, Client: p.client(id),
		Logger: slog.New(slog.NewTextHandler(io.Discard, nil)),
	})
	ctx, cancel := context.WithCancel(p.t.Context())
	ended := make(chan error, 1)
	go func() { ended <- reporter.Run(ctx) }()
	n.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			p.t.Errorf("the reporter of %s ended with %v", id, err)
		}
	})
	p.t.Cleanup(n.stop)
	return n
}

// traffic is n requests to a pool, with one full handshake and one close each.
func (n *node) traffic(pool string, requests int) {
	for range requests {
		n.Pool(pool).Handshake(0, resealv1.MissReason_MISS_REASON_NO_SESSION, 0x0303, time.Millisecond)
		n.Pool(pool).Add(exchange.Opened.At(), 1)
		n.Pool(pool).Request(false, time.Millisecond)
		n.Pool(pool).Add(exchange.Closed.At(int(resealv1.CloseKind_CLOSE_KIND_CLOSE_NOTIFY_BOTH), exchange.ByPeer), 1)
	}
}

func (p *plane) stats(request *resealv1.GetStatsRequest) *resealv1.GetStatsResponse {
	p.t.Helper()
	response, err := p.server.GetStats(p.t.Context(), request)
	if err != nil {
		p.t.Fatal(err)
	}
	return response
}

// requestsOf are the requests by pool.
func requestsOf(stats []*resealv1.Stats) map[string]uint64 {
	counts := map[string]uint64{}
	for _, s := range stats {
		counts[s.GetName()] = s.GetRequests()
	}
	return counts
}

func settle(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

func TestTotals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := startPlane(t)
		a, b := p.node("a", "1"), p.node("b", "1")
		settle(0)
		a.traffic("app", 3)
		b.traffic("app", 4)
		b.traffic("api", 1)
		b.Pool("app").Error("reset")
		b.Pool("app").Add(exchange.Connections.At(exchange.Idle), 2)
		b.Listener("web").Request(false, 0)
		b.Listener("web").Add(exchange.Answers.At(200), 1)
		started := time.Now()
		got := p.stats(&resealv1.GetStatsRequest{})
		if waited := time.Since(started); waited != 0 {
			t.Errorf("GetStats took %s though all edges answer at once", waited)
		}
		want := []*resealv1.Stats{
			{Name: "api", Requests: 1, Handshakes: &resealv1.Handshakes{Full: 1}, Misses: map[string]uint64{"no_session": 1},
				Connections: &resealv1.ConnectionStats{Opened: 1}, Closes: map[string]uint64{"close_notify_both": 1}, ClosesBy: map[string]uint64{"peer": 1}},
			{Name: "app", Requests: 7, Errors: map[string]uint64{"reset": 1}, Handshakes: &resealv1.Handshakes{Full: 7}, Misses: map[string]uint64{"no_session": 7},
				Connections: &resealv1.ConnectionStats{Opened: 7, Idle: 2}, Closes: map[string]uint64{"close_notify_both": 7}, ClosesBy: map[string]uint64{"peer": 7}},
		}
		if diff := cmp.Diff(want, got.GetPools(), protocmp.Transform()); diff != "" {
			t.Error(diff)
		}
		if len(got.GetStaleEdges()) != 0 || len(got.GetEdges()) != 2 || got.GetEdges()[0].GetEdge() != "a" || got.GetListeners()[0].GetRequests() != 1 {
			t.Errorf("got %v", got)
		}
		one := p.stats(&resealv1.GetStatsRequest{Edge: "a", Name: "app"})
		if diff := cmp.Diff(map[string]uint64{"app": 3}, requestsOf(one.GetPools())); diff != "" || len(one.GetListeners()) != 0 {
			t.Error(diff)
		}
	})
}

func TestStaleEdges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := startPlane(t)
		a := p.node("a", "1")
		a.traffic("app", 1)
		// One edge reports once and answers nothing, one is only said to live.
		stream, err := p.client("mute").Report(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		report := &resealv1.ReportRequest{Edge: "mute", BootId: "1", Pools: []*resealv1.Stats{{Name: "app", Requests: 10}}}
		if err := stream.Send(report); err != nil {
			t.Fatal(err)
		}
		p.live = []string{"absent"}
		settle(0)
		a.traffic("app", 1)
		for range 3 {
			started := time.Now()
			got := p.stats(&resealv1.GetStatsRequest{})
			if diff := cmp.Diff([]string{"absent", "mute"}, got.GetStaleEdges()); diff != "" {
				t.Error(diff)
			}
			if waited := time.Since(started); waited != askTimeout {
				t.Errorf("GetStats took %s", waited)
			}
			if diff := cmp.Diff(map[string]uint64{"app": 12}, requestsOf(got.GetPools())); diff != "" {
				t.Error(diff)
			}
			if rows := got.GetEdges(); len(rows) != 3 || rows[0].GetStale() || !rows[1].GetStale() || !rows[2].GetStale() {
				t.Errorf("edges %v", rows)
			}
		}
		// It was asked once, and not again before it answers.
		asked := make(chan uint64, 10)
		go func() {
			defer close(asked)
			for {
				request, err := stream.Recv()
				if err != nil {
					return
				}
				if request.GetRequest() > 0 {
					asked <- request.GetRequest()
				}
			}
		}()
		settle(0)
		if n, first := len(asked), <-asked; n != 1 || first != 1 {
			t.Errorf("asked %d times, first %d", n, first)
		}
		report.Answers = 1
		if err := stream.Send(report); err != nil {
			t.Fatal(err)
		}
		settle(0)
		if n, second := len(asked), <-asked; n != 1 || second != 2 {
			t.Errorf("asked %d times again, first %d", n, second)
		}
		p.stop()
	})
}

func TestRestartedEdge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := startPlane(t)
		first := time.Now()
		a := p.node("a", "1")
		settle(0)
		a.traffic("app", 100)
		settle(time.Minute)
		a.traffic("app", 10) // in the window, before the restart
		settle(6 * time.Second)
		a.stop()
		settle(10 * time.Second)
		a = p.node("a", "2")
		settle(0)
		a.traffic("app", 500) // more than before: only the boot id tells
		if diff := cmp.Diff(map[string]uint64{"app": 500}, requestsOf(p.stats(&resealv1.GetStatsRequest{}).GetPools())); diff != "" {
			t.Errorf("since boot: %s", diff)
		}
		window := &resealv1.GetStatsRequest{Since: durationpb.New(30 * time.Second)}
		if diff := cmp.Diff(map[string]uint64{"app": 510}, requestsOf(p.stats(window).GetPools())); diff != "" {
			t.Errorf("in 30s: %s", diff)
		}
		if start := p.stats(window).GetEdges()[0].GetWindowStart(); time.Since(start.AsTime()) < 30*time.Second {
			t.Errorf("the window of 30s starts at %s", start.AsTime())
		}
		window.Since = durationpb.New(time.Hour)
		if start := p.stats(window).GetEdges()[0].GetWindowStart(); !start.AsTime().Equal(first) {
			t.Errorf("the window of 1h starts at %s, the reports at %s", start.AsTime(), first)
		}
		if diff := cmp.Diff(map[string]uint64{"app": 610}, requestsOf(p.stats(window).GetPools())); diff != "" {
			t.Errorf("in 1h: %s", diff)
		}
	})
}

func TestWindows(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := startPlane(t)
		a := p.node("a", "1")
		settle(0)
		// One request a minute, for two hours.
		for range 120 {
			a.traffic("app", 1)
			settle(time.Minute)
		}
		a.Pool("app").Add(exchange.Connections.At(exchange.Active), 3)
		for since, want := range map[time.Duration]uint64{
			0: 120, 10 * time.Second: 0, 5 * time.Minute: 5, 30 * time.Minute: 30, time.Hour: 60,
		} {
			got := p.stats(&resealv1.GetStatsRequest{Since: durationpb.New(since)}).GetPools()[0]
			if got.GetRequests() != want || got.GetHandshakes().GetFull() != want || got.GetMisses()["no_session"] != want {
				t.Errorf("in %s: %v, want %d", since, got, want)
			}
			if got.GetConnections().GetActive() != 3 {
				t.Errorf("in %s: gauge %d", since, got.GetConnections().GetActive())
			}
		}
		e := p.server.edges["a"]
		// Two a minute, before and after the request.
		if n := len(e.history); n < 119 || n > 124 {
			t.Errorf("%d reports are kept for an hour", n)
		}
		if p.server.cells > len(e.history)*2 {
			t.Errorf("%d cells for %d reports", p.server.cells, len(e.history))
		}
	})
}

// An edge that left no longer counts, and is remembered for the windows when it
// comes back.
func TestLeaving(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := startPlane(t)
		p.live = []string{"a"}
		a := p.node("a", "1")
		settle(0)
		a.traffic("app", 5)
		settle(5 * time.Second)
		a.stop()
		settle(time.Minute)
		got := p.stats(&resealv1.GetStatsRequest{})
		if diff := cmp.Diff([]string{"a"}, got.GetStaleEdges()); diff != "" || requestsOf(got.GetPools())["app"] != 5 {
			t.Errorf("live but gone: %v", got)
		}
		p.live = nil
		if got := p.stats(&resealv1.GetStatsRequest{}); len(got.GetEdges()) != 0 || len(got.GetPools()) != 0 {
			t.Errorf("left: %v", got)
		}
		if _, err := p.server.GetStats(t.Context(), &resealv1.GetStatsRequest{Edge: "a"}); status.Code(err) != codes.NotFound {
			t.Errorf("asked for an edge that left: %v", err)
		}
		settle(2 * time.Hour)
		p.server.mu.Lock()
		if len(p.server.edges["a"].history) != 0 || p.server.cells != 0 {
			t.Errorf("%d reports, %d cells are left", len(p.server.edges["a"].history), p.server.cells)
		}
		p.server.mu.Unlock()
		settle(24 * time.Hour)
		pools, _ := p.server.fleet()
		p.server.mu.Lock()
		defer p.server.mu.Unlock()
		if len(p.server.edges) != 0 || pools["app"].plain[requests] != 5 || pools["app"].active != 0 {
			t.Errorf("%d edges are left, the fleet's totals are %v", len(p.server.edges), pools)
		}
	})
}

func TestBadRequests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := startPlane(t)
		for _, since := range []time.Duration{-time.Second, time.Hour + time.Second} {
			if _, err := p.server.GetStats(t.Context(), &resealv1.GetStatsRequest{Since: durationpb.New(since)}); status.Code(err) != codes.InvalidArgument {
				t.Errorf("since %s: %v", since, err)
			}
		}
		stream, err := p.client("").WatchStats(t.Context(), &resealv1.WatchStatsRequest{Interval: durationpb.New(time.Millisecond)})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := stream.Recv(); status.Code(err) != codes.InvalidArgument {
			t.Errorf("interval 1ms: %v", err)
		}
	})
}

func TestBadReports(t *testing.T) {
	for name, test := range map[string]struct {
		report *resealv1.ReportRequest
		want   codes.Code
	}{
		"for another":  {&resealv1.ReportRequest{Edge: "b"}, codes.PermissionDenied},
		"for nobody":   {&resealv1.ReportRequest{}, codes.PermissionDenied},
		"long boot id": {&resealv1.ReportRequest{Edge: "a", BootId: strings.Repeat("x", 300)}, codes.InvalidArgument},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := startPlane(t)
				stream, err := p.client("a").Report(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				if err := stream.Send(test.report); err != nil {
					t.Fatal(err)
				}
				if err := end(stream); status.Code(err) != test.want {
					t.Errorf("%v, want %s", err, test.want)
				}
				if len(p.server.edges) != 0 {
					t.Error("the report counts")
				}
			})
		})
	}
}

// end is how a stream ends.
func end(stream resealv1.TallyService_ReportClient) error {
	for {
		if _, err := stream.Recv(); err != nil {
			return err
		}
	}
}

func TestTakeover(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := startPlane(t)
		open := func(requests uint64) resealv1.TallyService_ReportClient {
			stream, err := p.client("a").Report(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if err := stream.Send(&resealv1.ReportRequest{Edge: "a", Pools: []*resealv1.Stats{{Name: "app", Requests: requests}}}); err != nil {
				t.Fatal(err)
			}
			settle(0)
			return stream
		}
		older := open(1)
		open(2)
		if err := end(older); status.Code(err) != codes.Aborted {
			t.Errorf("the older stream ended with %v", err)
		}
		if got := p.server.words.unpack(p.server.edges["a"].newest.pools[0]).plain[requests]; got != 2 {
			t.Errorf("%d requests", got)
		}
	})
}

func TestWatchStats(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := startPlane(t)
		a := p.node("a", "1")
		settle(0)
		a.traffic("app", 1) // the first response does not wait for more
		ctx, cancel := context.WithCancel(t.Context())
		stream, err := p.client("").WatchStats(ctx, &resealv1.WatchStatsRequest{Name: "app", Interval: durationpb.New(time.Second)})
		if err != nil {
			t.Fatal(err)
		}
		for i := range 3 {
			got, err := stream.Recv()
			if err != nil || requestsOf(got.GetStats().GetPools())["app"] != uint64(i+1) {
				t.Errorf("response %d: %v, %v", i, got, err)
			}
			a.traffic("app", 1)
		}
		cancel()
		if _, err := stream.Recv(); status.Code(err) != codes.Canceled {
			t.Error(err)
		}
	})
}

func TestMetrics(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := startPlane(t)
		a, b := p.node("a", "1"), p.node("b", "1")
		settle(0)
		a.traffic("app", 2)
		b.traffic("app", 3)
		b.Pool("app").Handshake(resealv1.Mechanism_MECHANISM_PSK, 0, 0x0304, 0)
		b.Pool("app").Request(true, 0)
		b.Pool("app").Add(exchange.Connections.At(exchange.Active), 1)
		a.Listener("web").HandshakeFailed(0)
		settle(5 * time.Second)
		want := `
# HELP reseal_fleet_backend_connections Open connections of the fleet to backends.
# TYPE reseal_fleet_backend_connections gauge
reseal_fleet_backend_connections{pool="app",state="active"} 1
reseal_fleet_backend_connections{pool="app",state="idle"} 0
# HELP reseal_fleet_backend_connections_closed_total Connections of the fleet to backends by how they ended.
# TYPE reseal_fleet_backend_connections_closed_total counter
reseal_fleet_backend_connections_closed_total{how="close_notify_both",pool="app"} 5
# HELP reseal_fleet_backend_requests_total Requests of the fleet to backends, by whether the connection had served one before.
# TYPE reseal_fleet_backend_requests_total counter
reseal_fleet_backend_requests_total{pool="app",reused="false"} 5
reseal_fleet_backend_requests_total{pool="app",reused="true"} 1
# HELP reseal_fleet_reports_ignored_total Pools and listeners in edges' reports that the edge does not have.
# TYPE reseal_fleet_reports_ignored_total counter
reseal_fleet_reports_ignored_total 0
# HELP reseal_fleet_tls_handshakes_total TLS handshakes of the fleet, health checks included.
# TYPE reseal_fleet_tls_handshakes_total counter
reseal_fleet_tls_handshakes_total{listener="",mechanism="none",pool="app",result="failed",side="backend"} 0
reseal_fleet_tls_handshakes_total{listener="",mechanism="none",pool="app",result="full",side="backend"} 5
reseal_fleet_tls_handshakes_total{listener="",mechanism="psk",pool="app",result="resumed",side="backend"} 1
reseal_fleet_tls_handshakes_total{listener="",mechanism="session_id",pool="app",result="resumed",side="backend"} 0
reseal_fleet_tls_handshakes_total{listener="",mechanism="ticket",pool="app",result="resumed",side="backend"} 0
reseal_fleet_tls_handshakes_total{listener="web",mechanism="none",pool="",result="failed",side="frontend"} 1
reseal_fleet_tls_handshakes_total{listener="web",mechanism="none",pool="",result="full",side="frontend"} 0
reseal_fleet_tls_handshakes_total{listener="web",mechanism="psk",pool="",result="resumed",side="frontend"} 0
reseal_fleet_tls_handshakes_total{listener="web",mechanism="session_id",pool="",result="resumed",side="frontend"} 0
reseal_fleet_tls_handshakes_total{listener="web",mechanism="ticket",pool="",result="resumed",side="frontend"} 0
# HELP reseal_fleet_tls_resumption_misses_total Full TLS handshakes of the fleet by the reason why they were not resumed.
# TYPE reseal_fleet_tls_resumption_misses_total counter
reseal_fleet_tls_resumption_misses_total{listener="",pool="app",reason="no_session",side="backend"} 5
`
		if err := testutil.GatherAndCompare(p.registry, strings.NewReader(want)); err != nil {
			t.Error(err)
		}
		if problems, err := testutil.GatherAndLint(p.registry); err != nil || len(problems) > 0 {
			t.Error(problems, err)
		}
	})
}
