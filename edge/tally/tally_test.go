package tally

import (
	"crypto/tls"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/testing/protocmp"
	"pgregory.net/rapid"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// The arrays must have a place for each value of the contract.
func TestSizesFitTheContract(t *testing.T) {
	values := resealv1.MissReason(0).Descriptor().Values()
	if values.Len() != misses || values.Get(values.Len()-1).Number() != protoreflect.EnumNumber(misses-1) {
		t.Errorf("there are %d reasons of misses, %d are counted", values.Len(), misses)
	}
	for index, version := range map[int]resealv1.TLSVersion{exchange.TLS12: resealv1.TLSVersion_TLS_VERSION_TLS1_2, exchange.TLS13: resealv1.TLSVersion_TLS_VERSION_TLS1_3} {
		if got, want := exchange.Full.Labels[1].Values[index], resealv1.Label(version); got != want {
			t.Errorf("version label %q, want %q", got, want)
		}
	}
}

// answer counts a request of a client.
func answer(listener *Counters, code int, reused bool, d time.Duration) {
	listener.Add(exchange.Answers.At(code), 1)
	listener.Request(reused, d)
}

// fill counts a bit of everything.
func fill(t *Tally) {
	pool, listener := t.Pool("app"), t.Listener("web")
	pool.Handshake(0, resealv1.MissReason_MISS_REASON_NO_SESSION, tls.VersionTLS12, 3*time.Millisecond)
	pool.Handshake(0, resealv1.MissReason_MISS_REASON_DECLINED, tls.VersionTLS13, 3*time.Millisecond)
	pool.Handshake(0, 0, 0x0301, 0)
	pool.Handshake(resealv1.Mechanism_MECHANISM_SESSION_ID, 0, tls.VersionTLS12, 0)
	pool.Handshake(resealv1.Mechanism_MECHANISM_TICKET, 0, tls.VersionTLS12, 0)
	pool.Handshake(resealv1.Mechanism_MECHANISM_PSK, 0, tls.VersionTLS13, 0)
	pool.HandshakeFailed(time.Second)
	pool.Add(exchange.Opened.At(), 6)
	pool.Add(exchange.Closed.At(int(resealv1.CloseKind_CLOSE_KIND_CLOSE_NOTIFY_BOTH), exchange.By(false)), 1)
	pool.Add(exchange.Closed.At(int(resealv1.CloseKind_CLOSE_KIND_CLOSE_NOTIFY_BOTH), exchange.By(true)), 1)
	pool.Add(exchange.Closed.At(int(resealv1.CloseKind_CLOSE_KIND_TIMEOUT), exchange.By(false)), 1)
	pool.Add(exchange.Connections.At(exchange.Active), 2)
	pool.Add(exchange.Connections.At(exchange.Idle), 1)
	pool.Request(false, time.Millisecond)
	pool.Request(true, time.Millisecond)
	pool.Error("reset")

	listener.Handshake(0, resealv1.MissReason_MISS_REASON_NOT_OFFERED, tls.VersionTLS13, 0)
	listener.Add(exchange.Opened.At(), 1)
	listener.Add(exchange.Connections.At(exchange.Active), 1)
	listener.Add(exchange.Connections.At(exchange.Active), -1)
	listener.Add(exchange.Closed.At(0, exchange.By(true)), 1)
	answer(listener, 200, false, time.Millisecond)
	answer(listener, 200, true, time.Millisecond)
	answer(listener, 502, true, time.Millisecond)
	answer(listener, 9999, true, time.Millisecond)
	answer(listener, 0, false, time.Millisecond)
	for _, d := range []time.Duration{10 * time.Millisecond, time.Minute} {
		listener.Add(exchange.Waits.At(exchange.Wait(d)), 1)
	}
}

func TestReport(t *testing.T) {
	counters := New(nil)
	fill(counters)
	counters.Pool("an-idle-one")
	got := counters.Report("e1", "b1", 7)
	got.Time = nil
	want := &resealv1.ReportRequest{
		Edge: "e1", BootId: "b1", Answers: 7,
		Pools: []*resealv1.Stats{
			{Name: "an-idle-one", Handshakes: &resealv1.Handshakes{}, Connections: &resealv1.ConnectionStats{}},
			{
				Name: "app", Requests: 2, Errors: map[string]uint64{"reset": 1},
				Handshakes:  &resealv1.Handshakes{Full: 3, ResumedSessionId: 1, ResumedTicket: 1, ResumedPsk: 1, Failed: 1},
				Misses:      map[string]uint64{"no_session": 1, "declined": 1, "unspecified": 1},
				Connections: &resealv1.ConnectionStats{Opened: 6, Reused: 1, Active: 2, Idle: 1},
				Closes:      map[string]uint64{"close_notify_both": 2, "timeout": 1},
				ClosesBy:    map[string]uint64{"us": 2, "peer": 1},
			},
		},
		Listeners: []*resealv1.Stats{{
			Name: "web", Requests: 5,
			Handshakes:  &resealv1.Handshakes{Full: 1},
			Misses:      map[string]uint64{"not_offered": 1},
			Connections: &resealv1.ConnectionStats{Opened: 1, Reused: 3},
			Answers:     map[string]uint64{"2xx": 2, "5xx": 1},
			Waits:       map[string]uint64{"10ms": 1, "longer": 1},
		}},
	}
	if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
}

func TestMetrics(t *testing.T) {
	registry := prometheus.NewRegistry()
	fill(New(registry))
	const want = `
# HELP reseal_backend_connections Open connections to backends.
# TYPE reseal_backend_connections gauge
reseal_backend_connections{pool="app",state="active"} 2
reseal_backend_connections{pool="app",state="idle"} 1
# HELP reseal_backend_connections_closed_total Connections to backends by how they ended and who closed first.
# TYPE reseal_backend_connections_closed_total counter
reseal_backend_connections_closed_total{by="peer",how="close_notify_both",pool="app"} 1
reseal_backend_connections_closed_total{by="us",how="close_notify_both",pool="app"} 1
reseal_backend_connections_closed_total{by="us",how="timeout",pool="app"} 1
# HELP reseal_backend_requests_total Requests to backends, by whether the connection had served one before.
# TYPE reseal_backend_requests_total counter
reseal_backend_requests_total{pool="app",reused="false"} 1
reseal_backend_requests_total{pool="app",reused="true"} 1
# HELP reseal_requests_total Requests of clients by status code; 0 is a connection of protocol tls that ended well.
# TYPE reseal_requests_total counter
reseal_requests_total{code="0",listener="web"} 1
reseal_requests_total{code="200",listener="web"} 2
reseal_requests_total{code="502",listener="web"} 1
reseal_requests_total{code="other",listener="web"} 1
# HELP reseal_tls_handshakes_total TLS handshakes, health checks included.
# TYPE reseal_tls_handshakes_total counter
reseal_tls_handshakes_total{listener="",mechanism="none",pool="app",result="failed",side="backend",version=""} 1
reseal_tls_handshakes_total{listener="",mechanism="none",pool="app",result="full",side="backend",version="other"} 1
reseal_tls_handshakes_total{listener="",mechanism="none",pool="app",result="full",side="backend",version="tls1.2"} 1
reseal_tls_handshakes_total{listener="",mechanism="none",pool="app",result="full",side="backend",version="tls1.3"} 1
reseal_tls_handshakes_total{listener="",mechanism="psk",pool="app",result="resumed",side="backend",version="tls1.3"} 1
reseal_tls_handshakes_total{listener="",mechanism="session_id",pool="app",result="resumed",side="backend",version="tls1.2"} 1
reseal_tls_handshakes_total{listener="",mechanism="ticket",pool="app",result="resumed",side="backend",version="tls1.2"} 1
reseal_tls_handshakes_total{listener="web",mechanism="none",pool="",result="failed",side="frontend",version=""} 0
reseal_tls_handshakes_total{listener="web",mechanism="none",pool="",result="full",side="frontend",version="tls1.2"} 0
reseal_tls_handshakes_total{listener="web",mechanism="none",pool="",result="full",side="frontend",version="tls1.3"} 1
reseal_tls_handshakes_total{listener="web",mechanism="psk",pool="",result="resumed",side="frontend",version="tls1.3"} 0
reseal_tls_handshakes_total{listener="web",mechanism="session_id",pool="",result="resumed",side="frontend",version="tls1.2"} 0
reseal_tls_handshakes_total{listener="web",mechanism="ticket",pool="",result="resumed",side="frontend",version="tls1.2"} 0
# HELP reseal_tls_resumption_misses_total Full TLS handshakes by the reason why they were not resumed.
# TYPE reseal_tls_resumption_misses_total counter
reseal_tls_resumption_misses_total{listener="",pool="app",reason="declined",side="backend"} 1
reseal_tls_resumption_misses_total{listener="",pool="app",reason="no_session",side="backend"} 1
reseal_tls_resumption_misses_total{listener="",pool="app",reason="unspecified",side="backend"} 1
reseal_tls_resumption_misses_total{listener="web",pool="",reason="not_offered",side="frontend"} 1
`
	names := []string{
		"reseal_backend_connections", "reseal_backend_connections_closed_total", "reseal_backend_requests_total",
		"reseal_requests_total", "reseal_tls_handshakes_total", "reseal_tls_resumption_misses_total",
	}
	if err := testutil.GatherAndCompare(registry, strings.NewReader(want), names...); err != nil {
		t.Error(err)
	}
	if problems, err := testutil.GatherAndLint(registry); err != nil || len(problems) > 0 {
		t.Error(problems, err)
	}
	for name, want := range map[string]int{
		"reseal_tls_handshake_seconds": 6, "reseal_request_seconds": 1, "reseal_backend_request_seconds": 1,
	} {
		if got, err := testutil.GatherAndCount(registry, name); err != nil || got != want {
			t.Errorf("%d series of %s, want %d: %v", got, name, want, err)
		}
	}
}

func TestForget(t *testing.T) {
	registry := prometheus.NewRegistry()
	counters := New(registry)
	fill(counters)
	kept := counters.Pool("kept")
	kept.Add(exchange.Opened.At(), 1)
	counters.Forget([]string{"kept", "never seen"}, nil)
	report := counters.Report("", "", 0)
	if len(report.GetPools()) != 1 || report.GetPools()[0].GetName() != "kept" || len(report.GetListeners()) != 0 {
		t.Errorf("left: %v", report)
	}
	if counters.Pool("kept") != kept {
		t.Error("a pool in force got new counters")
	}
	for name, want := range map[string]int{"reseal_tls_handshake_seconds": 3, "reseal_request_seconds": 0, "reseal_backend_request_seconds": 1} {
		if got, err := testutil.GatherAndCount(registry, name); err != nil || got != want {
			t.Errorf("%d series of %s are left, want %d: %v", got, name, want, err)
		}
	}
	if counters.Pool("app").stats().GetRequests() != 0 {
		t.Error("a pool that comes back does not start at 0")
	}
}

func TestNamesAreBounded(t *testing.T) {
	counters := New(nil)
	for i := range maxNames + 10 {
		counters.Pool(fmt.Sprint(i)).Add(exchange.Opened.At(), 1)
		counters.Listener(fmt.Sprint(i)).Add(exchange.Opened.At(), 1)
	}
	for i := range 3 * maxReasons {
		counters.Pool("0").Error(fmt.Sprint(i))
	}
	report := counters.Report("", "", 0)
	if len(report.GetPools()) != maxNames+1 || len(report.GetListeners()) != maxNames+1 {
		t.Errorf("%d pools, %d listeners", len(report.GetPools()), len(report.GetListeners()))
	}
	for _, stats := range report.GetPools() {
		switch stats.GetName() {
		case otherName:
			if stats.GetConnections().GetOpened() != 10 {
				t.Errorf("other: %v", stats)
			}
		case "0":
			if len(stats.GetErrors()) != maxReasons+1 || stats.GetErrors()[otherName] != 2*maxReasons {
				t.Errorf("%d reasons, other %d", len(stats.GetErrors()), stats.GetErrors()[otherName])
			}
		}
	}
}

// The sum of the misses is the number of full handshakes, whatever is counted
// and whenever it is read.
func TestInvariantHoldsUnderLoad(t *testing.T) {
	counters := New(nil)
	const workers, each = 4, 2000
	var group sync.WaitGroup
	for range workers {
		group.Go(func() {
			pool := counters.Pool("app")
			for i := range each {
				pool.Handshake(resealv1.Mechanism(i%2), resealv1.MissReason(i%(misses+3)), tls.VersionTLS13, 0)
				pool.Request(true, 0)
				pool.Error(fmt.Sprint(i % 100))
			}
		})
	}
	check := func() *resealv1.Stats {
		stats := counters.Report("", "", 0).GetPools()
		if len(stats) == 0 {
			return nil
		}
		var total uint64
		for _, count := range stats[0].GetMisses() {
			total += count
		}
		if total != stats[0].GetHandshakes().GetFull() || stats[0].GetConnections().GetReused() > stats[0].GetRequests() {
			t.Errorf("misses %d, full %d; reused %d, requests %d", total, stats[0].GetHandshakes().GetFull(),
				stats[0].GetConnections().GetReused(), stats[0].GetRequests())
		}
		return stats[0]
	}
	for range 200 {
		check()
	}
	group.Wait()
	last := check()
	var failures uint64
	for _, count := range last.GetErrors() {
		failures += count
	}
	if last.GetHandshakes().GetFull() != workers*each/2 || last.GetRequests() != workers*each || failures != workers*each {
		t.Errorf("counted %v", last)
	}
}

// Values that no contract has don't break the counters.
func TestStrangeValues(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		counters := New(nil)
		pool, listener := counters.Pool("p"), counters.Listener("l")
		mechanism := resealv1.Mechanism(rapid.Int32Range(-2, 6).Draw(t, "mechanism"))
		miss := resealv1.MissReason(rapid.Int32Range(-2, 30).Draw(t, "miss"))
		pool.Handshake(mechanism, miss, rapid.Uint16().Draw(t, "version"), 0)
		pool.Add(exchange.Closed.At(int(resealv1.CloseKind(rapid.Int32Range(-2, 9).Draw(t, "kind"))), exchange.By(rapid.Bool().Draw(t, "peer"))), 1)
		answer(listener, rapid.IntRange(-1000, 2000).Draw(t, "code"), false, 0)
		stats := pool.stats()
		h := stats.GetHandshakes()
		if got := h.GetFull() + h.GetResumedPsk() + h.GetResumedSessionId() + h.GetResumedTicket(); got != 1 {
			t.Fatalf("%d handshakes", got)
		}
		if listener.stats().GetRequests() != 1 {
			t.Fatal("the request is lost")
		}
	})
}

func BenchmarkCounting(b *testing.B) {
	listener := New(prometheus.NewRegistry()).Listener("web")
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			listener.Add(exchange.Connections.At(exchange.Active), 1)
			answer(listener, 200, true, time.Millisecond)
			listener.Add(exchange.Connections.At(exchange.Active), -1)
		}
	})
}
