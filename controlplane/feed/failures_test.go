package feed

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	edgefeed "github.com/reseal/reseal/edge/feed"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// startFailing starts an edge that remembers failures.
func startFailing(t *testing.T, p *plane, id string, report func(*resealv1.FailuresOrder) *resealv1.FailuresReport) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	feed := edgefeed.New(edgefeed.Config{
		Edge: id, BootID: "boot", Client: resealv1.NewFeedServiceClient(p.dial(id)), State: newDisk(), Logger: testLogger(),
		Apply:    func(context.Context, edgefeed.Candidate) edgefeed.Outcome { return edgefeed.Outcome{} },
		Failures: report,
	})
	go func() { ended <- feed.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("edge %s ended with %v", id, err)
		}
	})
	t.Cleanup(stop)
	return stop
}

func failed(second int, id string) *resealv1.Failure {
	return &resealv1.Failure{Time: timestamppb.New(time.Unix(int64(second), 0)), RequestId: id, Status: 502, Edge: "somebody else"}
}

// TestListFailures: all edges are asked at once; what they say is one list by time, of
// the newest; who does not answer within a second is named, and holds up nobody.
func TestListFailures(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		from := newSource()
		from.apply(many(pool("app", "10.0.0.1:80")))
		p := startPlane(t, from)
		var ordered *resealv1.FailuresOrder
		startFailing(t, p, "a", func(order *resealv1.FailuresOrder) *resealv1.FailuresReport {
			ordered = order
			return &resealv1.FailuresReport{Failures: []*resealv1.Failure{failed(1, "one"), failed(4, "four\x1b[2J")}}
		})
		startFailing(t, p, "b", func(*resealv1.FailuresOrder) *resealv1.FailuresReport {
			return &resealv1.FailuresReport{Failures: []*resealv1.Failure{failed(2, "two"), failed(3, "three")}}
		})
		startFailing(t, p, "none", nil)
		startFailing(t, p, "many", func(*resealv1.FailuresOrder) *resealv1.FailuresReport {
			report := &resealv1.FailuresReport{}
			for i := range edgeFailures + 1 {
				report.Failures = append(report.Failures, failed(i, "too many"))
			}
			return report
		})
		release := make(chan struct{})
		startFailing(t, p, "stuck", func(*resealv1.FailuresOrder) *resealv1.FailuresReport {
			<-release
			return &resealv1.FailuresReport{}
		})
		settle(time.Second)
		begun := time.Now()
		response, err := p.server.ListFailures(t.Context(), &resealv1.ListFailuresRequest{Pool: "app", Listener: "web", Limit: 3})
		if err != nil {
			t.Fatal(err)
		}
		if took := time.Since(begun); took > failuresTimeout {
			t.Errorf("took %s", took)
		}
		var got []string
		for _, f := range response.GetFailures() {
			got = append(got, f.GetEdge()+" "+f.GetRequestId())
		}
		if want := []string{"b two", "b three", `a four\x1b[2J`}; fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("got %q", got)
		}
		if fmt.Sprint(response.GetSilentEdges()) != "[many stuck]" {
			t.Errorf("silent: %v", response.GetSilentEdges())
		}
		if ordered.GetPool() != "app" || ordered.GetListener() != "web" || ordered.GetLimit() != 3 {
			t.Errorf("ordered %v", ordered)
		}
		close(release)
		settle(time.Second) // its late answer is dropped

		for i, of := range []struct {
			request *resealv1.ListFailuresRequest
			code    codes.Code
			n       int
		}{
			{&resealv1.ListFailuresRequest{Edge: "a"}, codes.OK, 2},
			{&resealv1.ListFailuresRequest{Edge: "nobody"}, codes.NotFound, 0},
			{&resealv1.ListFailuresRequest{Limit: resealv1.MaxFailures + 1}, codes.InvalidArgument, 0},
			{&resealv1.ListFailuresRequest{Limit: -1}, codes.InvalidArgument, 0},
		} {
			response, err := p.server.ListFailures(t.Context(), of.request)
			if status.Code(err) != of.code || len(response.GetFailures()) != of.n {
				t.Errorf("%d: %v, %v", i, response, err)
			}
		}
	})
}
