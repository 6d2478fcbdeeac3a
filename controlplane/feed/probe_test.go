package feed

import (
	"context"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	edgefeed "github.com/reseal/reseal/edge/feed"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// prober is an edge that probes.
type prober struct {
	mu     sync.Mutex
	orders []*resealv1.ProbeOrder
	stop   func()
}

func startProber(t *testing.T, p *plane, id string, probe func(context.Context, *resealv1.ProbeOrder) *resealv1.ProbeReport) *prober {
	t.Helper()
	edge := &prober{}
	config := edgefeed.Config{
		Edge: id, BootID: "boot", Client: resealv1.NewFeedServiceClient(p.dial(id)), State: newDisk(), Logger: testLogger(),
		Apply: func(context.Context, edgefeed.Candidate) edgefeed.Outcome { return edgefeed.Outcome{} },
	}
	if probe != nil {
		config.Probe = func(ctx context.Context, order *resealv1.ProbeOrder) *resealv1.ProbeReport {
			edge.mu.Lock()
			edge.orders = append(edge.orders, order)
			edge.mu.Unlock()
			return probe(ctx, order)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- edgefeed.New(config).Run(ctx) }()
	edge.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("edge %s ended with %v", id, err)
		}
	})
	t.Cleanup(edge.stop)
	return edge
}

func probeOf(edge, pool, address string) *resealv1.ProbeBackendRequest {
	return &resealv1.ProbeBackendRequest{Edge: edge, Order: &resealv1.ProbeOrder{Pool: pool, Address: address}}
}

// probeSource holds a pool with endpoints and one with DNS.
func probeSource() *source {
	from := newSource()
	named := pool("named", "")
	named.GetBackendPool().Endpoints = nil
	named.GetBackendPool().Dns = &resealv1.DNSEndpoints{Name: "jetty.internal", Port: 8443}
	from.apply(many(pool("fixed", "10.0.0.1:443"), named))
	return from
}

func TestProbe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := startPlane(t, probeSource())
		edge := startProber(t, p, "e1", func(_ context.Context, order *resealv1.ProbeOrder) *resealv1.ProbeReport {
			time.Sleep(3 * time.Second)
			return &resealv1.ProbeReport{Address: order.GetAddress(), Advice: "all is well"}
		})
		settle(0)
		request := probeOf("e1", "fixed", "10.0.0.1:443")
		request.Order.Idle, request.Order.Id = durationpb.New(time.Second), 4711
		for range 2 {
			response, err := p.server.ProbeBackend(t.Context(), request)
			if err != nil || response.GetReport().GetAdvice() != "all is well" || response.GetReport().GetAddress() != "10.0.0.1:443" {
				t.Fatalf("%v, %v", response, err)
			}
		}
		if _, err := p.server.ProbeBackend(t.Context(), probeOf("e1", "named", "jetty.internal:8443")); err != nil {
			t.Error(err)
		}
		edge.mu.Lock()
		defer edge.mu.Unlock()
		if len(edge.orders) != 3 || edge.orders[0].GetId() != 1 || edge.orders[1].GetId() != 2 || edge.orders[0].GetIdle().AsDuration() != time.Second {
			t.Errorf("orders %v", edge.orders)
		}
		if request.GetOrder().GetId() != 4711 {
			t.Error("the request was changed")
		}
	})
}

// TestProbeDuringUpdates: a probe does not hold up the configuration.
func TestProbeDuringUpdates(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		from := probeSource()
		p := startPlane(t, from)
		startProber(t, p, "e1", func(context.Context, *resealv1.ProbeOrder) *resealv1.ProbeReport {
			time.Sleep(50 * time.Second)
			return &resealv1.ProbeReport{}
		})
		settle(0)
		done := make(chan error, 1)
		go func() {
			_, err := p.server.ProbeBackend(t.Context(), probeOf("e1", "fixed", "10.0.0.1:443"))
			done <- err
		}()
		settle(time.Second)
		revision := from.apply(many(pool("other", "10.0.0.2:443")))
		settle(time.Second)
		if got := p.edge("e1").GetAckedRevision(); got != revision {
			t.Errorf("acked %d while a probe runs, want %d", got, revision)
		}
		// One at a time.
		if _, err := p.server.ProbeBackend(t.Context(), probeOf("e1", "fixed", "10.0.0.1:443")); status.Code(err) != codes.ResourceExhausted {
			t.Errorf("a second probe: %v", err)
		}
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestProbeIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := startPlane(t, probeSource())
		edge := startProber(t, p, "e1", func(_ context.Context, order *resealv1.ProbeOrder) *resealv1.ProbeReport {
			if order.GetPool() == "named" {
				return nil
			}
			return &resealv1.ProbeReport{Error: "pool \"fixed\" is not in its plan"}
		})
		startProber(t, p, "old", nil)
		settle(0)
		long := probeOf("e1", "fixed", "10.0.0.1:443")
		long.Order.Idle = durationpb.New(31 * time.Second)
		negative := probeOf("e1", "fixed", "10.0.0.1:443")
		negative.Order.Idle = durationpb.New(-1)
		path := probeOf("e1", "fixed", "10.0.0.1:443")
		path.Order.Path = "/" + strings.Repeat("x", 5000)
		for _, test := range []struct {
			request *resealv1.ProbeBackendRequest
			code    codes.Code
			text    string
		}{
			{&resealv1.ProbeBackendRequest{}, codes.InvalidArgument, "must be set"},
			{probeOf("", "fixed", "10.0.0.1:443"), codes.InvalidArgument, "edge: must be set"},
			{probeOf("e1", "", "10.0.0.1:443"), codes.InvalidArgument, "order.pool"},
			{probeOf("e1", "fixed", ""), codes.InvalidArgument, "order.address"},
			{probeOf("e1", "nope", "10.0.0.1:443"), codes.NotFound, `backendpool "nope"`},
			{probeOf("e1", "fixed", "10.0.0.9:443"), codes.InvalidArgument, "is not an endpoint"},
			{probeOf("e1", "fixed", "jetty.internal:8443"), codes.InvalidArgument, "is not an endpoint"},
			{long, codes.InvalidArgument, "order.idle"},
			{negative, codes.InvalidArgument, "order.idle"},
			{path, codes.InvalidArgument, "order.path"},
			{probeOf("e9", "fixed", "10.0.0.1:443"), codes.NotFound, `edge "e9"`},
			{probeOf("e1", "fixed", "10.0.0.1:443"), codes.FailedPrecondition, "not in its plan"},
			{probeOf("e1", "named", "jetty.internal:8443"), codes.FailedPrecondition, "does not probe this"},
			{probeOf("old", "fixed", "10.0.0.1:443"), codes.FailedPrecondition, "does not probe"},
		} {
			_, err := p.server.ProbeBackend(t.Context(), test.request)
			if status.Code(err) != test.code || !strings.Contains(err.Error(), test.text) {
				t.Errorf("%v: %v, want %v with %q", test.request, err, test.code, test.text)
			}
		}
		edge.mu.Lock()
		defer edge.mu.Unlock()
		if len(edge.orders) != 2 {
			t.Errorf("the edge heard of %v", edge.orders)
		}
	})
}

// TestProbeIsBounded: an edge that does not report, one that leaves, and a
// caller that goes away all free the edge for the next probe.
func TestProbeIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := startPlane(t, probeSource())
		edge := startProber(t, p, "e1", func(ctx context.Context, order *resealv1.ProbeOrder) *resealv1.ProbeReport {
			if order.GetServerName() == "stubborn" {
				time.Sleep(2 * time.Minute)
				return &resealv1.ProbeReport{}
			}
			<-ctx.Done()
			return &resealv1.ProbeReport{Error: "time is up"}
		})
		settle(0)
		request := probeOf("e1", "fixed", "10.0.0.1:443")
		began := time.Now()
		_, err := p.server.ProbeBackend(t.Context(), request)
		if took := time.Since(began); status.Code(err) != codes.FailedPrecondition || took != 55*time.Second {
			t.Errorf("after %s: %v", took, err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		_, err = p.server.ProbeBackend(ctx, request)
		cancel()
		if status.Code(err) != codes.DeadlineExceeded {
			t.Errorf("the caller went away: %v", err)
		}
		// The edge still probes and says so; its report to the other order is
		// dropped.
		if _, err = p.server.ProbeBackend(t.Context(), request); status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "another probe runs") {
			t.Errorf("the edge still probes: %v", err)
		}
		settle(time.Minute)
		request.Order.ServerName = "stubborn"
		began = time.Now()
		_, err = p.server.ProbeBackend(t.Context(), request)
		if took := time.Since(began); status.Code(err) != codes.Unavailable || took != time.Minute {
			t.Errorf("after %s: %v", took, err)
		}
		settle(2 * time.Minute)
		request.Order.ServerName = ""
		time.AfterFunc(time.Second, edge.stop)
		if _, err = p.server.ProbeBackend(t.Context(), request); status.Code(err) != codes.Unavailable {
			t.Errorf("the edge left: %v", err)
		}
	})
}
