package edge

import (
	"bufio"
	"context"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/reseal/reseal/edge/feed"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// TestPanicInAnApply: wherever an apply panics, the answer tells where, and what was
// in force serves on, as a whole: listeners, addresses, pools. The next configuration
// is applied as ever.
func TestPanicInAnApply(t *testing.T) {
	for stage, at := range map[string]struct {
		poison func(x *bothLegs) (mend func())
		where  string
	}{
		"prepare": {func(x *bothLegs) func() {
			kept := x.edge.frontend
			x.edge.frontend = nil
			return func() { x.edge.frontend = kept }
		}, "edge/frontend.(*Frontend)."},
		"pools": {func(x *bothLegs) func() {
			kept := x.edge.share
			x.edge.share = nil
			return func() { x.edge.share = kept }
		}, "edge.(*Edge).shareSessions"},
		"after the commit": {func(x *bothLegs) func() {
			kept := x.edge.tally
			x.edge.tally = nil
			return func() { x.edge.tally = kept }
		}, "edge.(*Edge).forgetCounters"},
	} {
		t.Run(stage, func(t *testing.T) {
			b := serveRaw(t, "http/1.1", answering)
			x := newLegs(t, b.address)
			serves := func(when string) {
				t.Helper()
				if status, body := x.visitor("http/1.1")("/", ""); status != "200" || body != "as ever" {
					t.Fatalf("%s: %s %q", when, status, body)
				}
			}
			serves("before")
			before := x.edge.frontend.Addr("web").String()

			good := x.resources
			x.resources = nil
			for _, r := range good {
				x.resources = append(x.resources, proto.CloneOf(r))
			}
			x.resources[1].GetBackendPool().Endpoints[0].Address = "127.0.0.1:1"
			x.resources[0].GetListener().Address = "127.0.0.1:" + freePort(t)
			mend := at.poison(x)
			outcome := x.edge.Apply(context.Background(), feed.Candidate{Snapshot: resealv1.NewSnapshot("test", 2, x.resources)})
			mend()
			if len(outcome.Violations) != 1 || outcome.InForce != nil {
				t.Fatalf("%+v", outcome)
			}
			if text := outcome.Violations[0].GetDescription(); !strings.Contains(text, "which is a bug") || !strings.Contains(text, at.where) || len(text) > 2048 {
				t.Errorf("refused by %q", text)
			}
			if now := x.edge.frontend.Addr("web").String(); now != before && stage != "after the commit" {
				t.Errorf("listening on %s, before on %s", now, before)
			}
			serves("after the panic")
			if conn, err := net.Dial("tcp", x.resources[0].GetListener().GetAddress()); err == nil {
				_ = conn.Close()
				t.Error("the address of what was refused is bound")
			}
			x.resources[1].GetBackendPool().Endpoints[0].Address = b.address
			x.apply()
			if now := x.edge.frontend.Addr("web").String(); now != x.resources[0].GetListener().GetAddress() {
				t.Errorf("then listening on %s", now)
			}
			serves("in the end")
		})
	}
}

func answering(c net.Conn, _ int) {
	for reader := bufio.NewReader(c); ; {
		if _, err := http.ReadRequest(reader); err != nil {
			return
		}
		if _, err := io.WriteString(c, ok("as ever")); err != nil {
			return
		}
	}
}

func freePort(t *testing.T) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	_, port, _ := net.SplitHostPort(listener.Addr().String())
	return port
}
