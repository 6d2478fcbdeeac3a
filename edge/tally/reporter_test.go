package tally

import (
	"context"
	"io"
	"log/slog"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

type reportServer = grpc.BidiStreamingServer[resealv1.ReportRequest, resealv1.ReportResponse]

// plane takes reports.
type plane struct {
	resealv1.UnimplementedTallyServiceServer
	mu      sync.Mutex
	reports []*resealv1.ReportRequest
	times   []time.Time
	streams []reportServer
	refuse  bool
}

func (p *plane) Report(stream reportServer) error {
	p.mu.Lock()
	p.streams = append(p.streams, stream)
	refuse := p.refuse
	p.mu.Unlock()
	if refuse {
		return status.Error(codes.Unavailable, "no")
	}
	for {
		report, err := stream.Recv()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		p.mu.Lock()
		p.reports = append(p.reports, report)
		p.times = append(p.times, time.Now())
		p.mu.Unlock()
	}
}

func startReporter(t *testing.T) (*plane, *Tally) {
	t.Helper()
	pipe := bufconn.Listen(1 << 20)
	p, counters := &plane{}, New(nil)
	server := grpc.NewServer()
	resealv1.RegisterTallyServiceServer(server, p)
	serving := make(chan error, 1)
	go func() { serving <- server.Serve(pipe) }()
	conn, err := grpc.NewClient("passthrough:///", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return pipe.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	reporter := NewReporter(ReporterConfig{
		Edge: "e1", BootID: "b1", Tally: counters, Client: resealv1.NewTallyServiceClient(conn), Logger: slog.New(slog.DiscardHandler),
	})
	ctx, cancel := context.WithCancel(t.Context())
	running := make(chan error, 1)
	go func() { running <- reporter.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-running; err != nil {
			t.Errorf("Run: %v", err)
		}
		conn.Close()
		server.Stop()
		if err := <-serving; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return p, counters
}

func settle(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

func TestReportsAtLeastEvery5s(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, counters := startReporter(t)
		settle(0)
		counters.Pool("app").Add(exchange.Opened.At(), 1)
		settle(time.Minute)
		if n := len(p.reports); n < 13 || n > 17 {
			t.Errorf("%d reports in a minute", n)
		}
		for i := 1; i < len(p.times); i++ {
			if gap := p.times[i].Sub(p.times[i-1]); gap > 5*time.Second {
				t.Errorf("%s without a report", gap)
			}
		}
		last := p.reports[len(p.reports)-1]
		if last.GetEdge() != "e1" || last.GetBootId() != "b1" || last.GetPools()[0].GetConnections().GetOpened() != 1 || last.GetAnswers() != 0 {
			t.Errorf("reported %v", last)
		}
	})
}

func TestReportsWhenAsked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, counters := startReporter(t)
		settle(time.Second)
		for request := range uint64(3) {
			counters.Pool("app").Add(exchange.Opened.At(), 1)
			if err := p.streams[0].Send(&resealv1.ReportResponse{Request: request + 1}); err != nil {
				t.Fatal(err)
			}
			settle(0)
			last := p.reports[len(p.reports)-1]
			if last.GetAnswers() != request+1 || last.GetPools()[0].GetConnections().GetOpened() != request+1 {
				t.Errorf("asked for %d, got %v", request+1, last)
			}
		}
		if len(p.reports) != 4 {
			t.Errorf("%d reports", len(p.reports))
		}
	})
}

func TestReporterComesBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, _ := startReporter(t)
		p.mu.Lock()
		p.refuse = true
		p.mu.Unlock()
		settle(10 * time.Minute)
		if n := len(p.streams); n < 60 || n > 140 || len(p.reports) != 0 {
			t.Errorf("%d tries in 10 minutes, %d reports", n, len(p.reports))
		}
		p.mu.Lock()
		p.refuse = false
		p.mu.Unlock()
		settle(10 * time.Second)
		if len(p.reports) == 0 {
			t.Error("no report after the control plane came back")
		}
		// Requests of a stream before this one are forgotten.
		if p.reports[0].GetAnswers() != 0 {
			t.Errorf("answers %d", p.reports[0].GetAnswers())
		}
	})
}

// TestReportsWhatHasChanged, once the control plane has said that it adds that up.
func TestReportsWhatHasChanged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, counters := startReporter(t)
		counters.Pool("a").Add(exchange.Opened.At(), 1)
		counters.Pool("b").Add(exchange.Opened.At(), 1)
		next := func() *resealv1.ReportRequest {
			t.Helper()
			settle(reportInterval)
			p.mu.Lock()
			defer p.mu.Unlock()
			return p.reports[len(p.reports)-1]
		}
		count := func() int {
			p.mu.Lock()
			defer p.mu.Unlock()
			return len(p.reports)
		}
		if report := next(); report.GetPartial() || len(report.GetPools()) != 2 {
			t.Errorf("an older control plane gets %v", report)
		}
		if err := p.streams[0].Send(&resealv1.ReportResponse{TakesPartial: true}); err != nil {
			t.Fatal(err)
		}
		settle(0)
		before := count()
		if next(); count() != before+1 {
			t.Error("a response that asks for nothing is answered")
		}
		if report := next(); !report.GetPartial() || len(report.GetPools()) != 0 || report.GetEdge() != "e1" || report.GetBootId() != "b1" {
			t.Errorf("when nothing has changed: %v", report)
		}
		counters.Pool("b").Add(exchange.Opened.At(), 1)
		counters.Pool("c").Add(exchange.Opened.At(), 1)
		if report := next(); !report.GetPartial() || len(report.GetPools()) != 2 || report.GetPools()[0].GetName() != "b" || report.GetPools()[1].GetName() != "c" {
			t.Errorf("when one has changed and one is new: %v", report)
		}
		counters.Forget([]string{"a", "c"}, nil)
		if report := next(); report.GetPartial() || len(report.GetPools()) != 2 {
			t.Errorf("when one is gone: %v", report)
		}
		if report := next(); !report.GetPartial() || len(report.GetPools()) != 0 {
			t.Errorf("after that: %v", report)
		}
	})
}
