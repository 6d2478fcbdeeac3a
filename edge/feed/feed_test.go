package feed

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func TestHello(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		started := time.Now().Add(-time.Hour)
		h := run(t, &memory{}, func(stream syncStream, _ *resealv1.Hello) error { return hold(stream) },
			func(c *Config) { c.StartedAt = started })
		settle(0)
		hellos, _ := h.server.seen()
		want := &resealv1.Hello{Edge: "e1", BootId: "b1", Version: "v1", Labels: map[string]string{"site": "a"}, StartedAt: timestamppb.New(started)}
		if diff := cmp.Diff(want, hellos[0], protocmp.Transform()); diff != "" {
			t.Error(diff)
		}
		if h.Connected() || h.Revision() != 0 {
			t.Error("connected before the server said a word")
		}
	})
}

func TestStreamAfterStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a1, a2 := encoded(t, "a", "a:1"), encoded(t, "a", "a:2")
		second := full(2, a2)
		h := run(t, &memory{}, func(stream syncStream, hello *resealv1.Hello) error {
			if hello.GetRevision() == 0 {
				_, err := send(stream, full(1, a1), on(1, 2, second.Hash, a2))
				if err != nil {
					return err
				}
				return status.Error(codes.Unavailable, "restarts")
			}
			if _, err := send(stream, on(2, 5, second.Hash)); err != nil {
				return err
			}
			return hold(stream)
		})
		settle(time.Minute)
		hellos, _ := h.server.seen()
		if len(hellos) != 2 || hellos[1].GetRevision() != 2 || string(hellos[1].GetHash()) != string(second.Hash) || hellos[1].GetClusterId() != "c" {
			t.Errorf("hellos %v", hellos)
		}
		if !h.Connected() || h.Revision() != 5 {
			t.Errorf("connected %t, revision %d", h.Connected(), h.Revision())
		}
		select {
		case <-h.Synced():
		default:
			t.Error("not synced")
		}
		if h.state.written() != 2 && h.state.written() != 1 {
			t.Errorf("%d writes of two contents", h.state.written())
		}
		h.stop()
		if h.Connected() {
			t.Error("still connected")
		}
	})
}

// An update that does not fit ends the stream, and the next starts from nothing.
func TestProtocolErrors(t *testing.T) {
	a, b := encoded(t, "a", "a:1"), encoded(t, "b", "b:1")
	good := full(1, a)
	wrongHash := full(2, a, b)
	wrongHash.Hash = []byte("wrong")
	otherCluster := on(1, 2, good.Hash)
	otherCluster.ClusterId = "d"
	for name, bad := range map[string]*resealv1.Update{
		"base not held":      on(7, 8, good.Hash),
		"hash is wrong":      wrongHash,
		"delta without hash": on(1, 2, nil, b),
		"another cluster":    otherCluster,
		"no revision":        full(0, a),
		"negative revision":  full(-1, a),
		"delete is missing":  {ClusterId: "c", BaseRevision: 1, Revision: 2, Hash: full(2).Hash},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				healed := full(9, a, b)
				h := run(t, &memory{}, func(stream syncStream, _ *resealv1.Hello) error {
					// The edge does not answer the bad one.
					_, err := send(stream, good, bad)
					if err == nil {
						t.Error("the bad update was answered")
					}
					return err
				})
				settle(50 * time.Millisecond)
				if h.Revision() != 1 {
					t.Fatalf("revision %d", h.Revision())
				}
				h.server.follow(func(stream syncStream, hello *resealv1.Hello) error {
					if hello.GetRevision() != 0 || hello.GetHash() != nil || hello.GetClusterId() != "" {
						t.Errorf("said %v after a protocol error", hello)
					}
					if _, err := send(stream, healed); err != nil {
						t.Error(err)
					}
					return hold(stream)
				})
				settle(30 * time.Second)
				if h.Revision() != 9 {
					t.Errorf("revision %d", h.Revision())
				}
			})
		})
	}
}

// Resources that this edge can't use are refused, and held all the same.
func TestUnusableResources(t *testing.T) {
	misnamed := encoded(t, "a", "a:1")
	misnamed.Name = "b"
	for name, bad := range map[string]*resealv1.EncodedResource{
		"not a resource": {Kind: "Route", Name: "r", Resource: []byte{0xff}},
		"unknown kind":   {Kind: "Teapot", Name: "t", Resource: []byte{}},
		"another's name": misnamed,
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				good := encoded(t, "z", "z:1")
				repaired := &resealv1.Update{ClusterId: "c", BaseRevision: 1, Revision: 2, Hash: full(2, good).Hash,
					Deletes: []*resealv1.ResourceRef{{Kind: bad.Kind, Name: bad.Name}}}
				h := run(t, &memory{}, func(stream syncStream, _ *resealv1.Hello) error {
					answers, err := send(stream, full(1, good, bad), repaired)
					if err != nil {
						t.Error(err)
						return err
					}
					violations := answers[0].GetNack().GetViolations()
					if len(violations) != 1 || violations[0].GetResource().GetName() != bad.Name || answers[1].GetAck().GetRevision() != 2 {
						t.Errorf("answered %v", answers)
					}
					return hold(stream)
				}, func(c *Config) {
					c.Apply = whole(func(_ context.Context, snapshot *resealv1.Snapshot) []*resealv1.Violation {
						if snapshot.Len() != 1 {
							t.Errorf("asked to apply %d resources", snapshot.Len())
						}
						return nil
					})
				})
				settle(0)
				if h.Revision() != 2 {
					t.Errorf("revision %d", h.Revision())
				}
			})
		})
	}
}

func TestNackNamesWhatIsServed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a1, a2 := encoded(t, "a", "a:1"), encoded(t, "a", "a:2")
		var many []*resealv1.Violation
		for i := range 3 * maxViolations {
			many = append(many, &resealv1.Violation{Description: fmt.Sprint(i)})
		}
		var answers []*resealv1.SyncRequest
		run(t, &memory{}, func(stream syncStream, _ *resealv1.Hello) error {
			got, err := send(stream, full(1, a1), full(2, a2))
			answers = got
			if err != nil {
				return err
			}
			return hold(stream)
		}, func(c *Config) {
			c.Apply = whole(func(_ context.Context, snapshot *resealv1.Snapshot) []*resealv1.Violation {
				if snapshot.Revision() == 2 {
					return many
				}
				return nil
			})
		})
		settle(0)
		nack := answers[1].GetNack()
		if nack.GetRevision() != 2 || nack.GetServingRevision() != 1 || len(nack.GetViolations()) != maxViolations {
			t.Errorf("nack of %d, serving %d, %d violations", nack.GetRevision(), nack.GetServingRevision(), len(nack.GetViolations()))
		}
	})
}

// A refused configuration is tried again even while there is no stream, and the
// next stream says that it is in force.
func TestRetryWithoutStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := encoded(t, "a", "a:1")
		var mended atomic.Bool
		var tries atomic.Int64
		h := run(t, &memory{}, func(stream syncStream, hello *resealv1.Hello) error {
			if hello.GetRevision() > 0 {
				return status.Error(codes.Unavailable, "away")
			}
			_, _ = send(stream, full(1, a))
			return status.Error(codes.Unavailable, "away")
		}, func(c *Config) {
			c.Apply = whole(func(context.Context, *resealv1.Snapshot) []*resealv1.Violation {
				tries.Add(1)
				if !mended.Load() {
					return []*resealv1.Violation{{Description: "port in use"}}
				}
				return nil
			})
		})
		settle(25 * time.Second)
		if h.Revision() != 0 || tries.Load() != 3 || h.state.written() != 0 {
			t.Errorf("revision %d, %d tries, %d writes", h.Revision(), tries.Load(), h.state.written())
		}
		mended.Store(true)
		settle(10 * time.Second)
		if h.Revision() != 1 || tries.Load() != 4 || h.state.written() != 1 {
			t.Errorf("revision %d, %d tries, %d writes", h.Revision(), tries.Load(), h.state.written())
		}
		settle(time.Minute)
		if tries.Load() != 4 {
			t.Errorf("%d tries of what is in force", tries.Load())
		}
	})
}

// A late answer that a newer update has overtaken is not sent.
func TestLateAnswerIsOvertaken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ack := func(revision int64) *resealv1.SyncRequest {
			return &resealv1.SyncRequest{Message: &resealv1.SyncRequest_Ack{Ack: &resealv1.Ack{Revision: revision}}}
		}
		heard := make(chan *resealv1.SyncRequest, 10)
		h := run(t, &memory{}, func(stream syncStream, _ *resealv1.Hello) error {
			if _, err := send(stream, full(1, encoded(t, "a", "a:1")), full(2, encoded(t, "a", "a:2"))); err != nil {
				t.Error(err)
			}
			for {
				answer, err := stream.Recv()
				if err != nil {
					return err
				}
				heard <- answer
			}
		})
		settle(0)
		for _, revision := range []int64{1, 2} {
			h.mu.Lock()
			h.session.answerLate(ack(revision))
			h.mu.Unlock()
			settle(0)
		}
		if n, first := len(heard), <-heard; n != 1 || first.GetAck().GetRevision() != 2 {
			t.Errorf("%d late answers, first %v", n, first)
		}
	})
}

// A broken stream does not cut an apply short.
func TestApplyOutlivesStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := run(t, &memory{}, func(stream syncStream, hello *resealv1.Hello) error {
			if hello.GetRevision() == 0 {
				_ = stream.Send(updateMessage(full(1, encoded(t, "a", "a:1"))))
				return status.Error(codes.Unavailable, "gone")
			}
			return hold(stream)
		}, func(c *Config) {
			c.Apply = whole(func(ctx context.Context, _ *resealv1.Snapshot) []*resealv1.Violation {
				time.Sleep(time.Second)
				if ctx.Err() != nil {
					return []*resealv1.Violation{{Description: "cut short"}}
				}
				return nil
			})
		})
		settle(5 * time.Second)
		if h.Revision() != 1 {
			t.Error("what was received was not applied")
		}
	})
}

func TestUnchangedInPlaceOfApply(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := encoded(t, "a", "a:1"), encoded(t, "b", "b:1")
		one := full(1, a)
		var calls []string
		run(t, &memory{}, func(stream syncStream, _ *resealv1.Hello) error {
			if _, err := send(stream, one, on(1, 2, one.Hash), on(2, 3, full(3, a, b).Hash, b)); err != nil {
				t.Error(err)
			}
			return hold(stream)
		}, func(c *Config) {
			c.Apply = whole(func(_ context.Context, snapshot *resealv1.Snapshot) []*resealv1.Violation {
				calls = append(calls, fmt.Sprint("apply ", snapshot.Revision()))
				return nil
			})
			c.Unchanged = func(revision int64) { calls = append(calls, fmt.Sprint("unchanged ", revision)) }
		})
		settle(0)
		if diff := cmp.Diff([]string{"apply 1", "unchanged 2", "apply 3"}, calls); diff != "" {
			t.Error(diff)
		}
	})
}

func TestDrainOrders(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var orders []string
		run(t, &memory{}, func(stream syncStream, _ *resealv1.Hello) error {
			for _, drain := range []*resealv1.Drain{{Drain: true, Timeout: durationpb.New(time.Minute)}, {}} {
				if err := stream.Send(&resealv1.SyncResponse{Message: &resealv1.SyncResponse_Drain{Drain: drain}}); err != nil {
					return err
				}
			}
			// What a newer server may say means nothing to this edge.
			if err := stream.Send(&resealv1.SyncResponse{}); err != nil {
				return err
			}
			return hold(stream)
		}, func(c *Config) {
			c.Drain = func(drain bool, timeout time.Duration) { orders = append(orders, fmt.Sprint(drain, " ", timeout)) }
		})
		settle(0)
		if diff := cmp.Diff([]string{"true 1m0s", "false 0s"}, orders); diff != "" {
			t.Error(diff)
		}
	})
}

// An edge that knows one replica says once that it can't move, though it is asked again
// and again.
func TestMoveOrders(t *testing.T) {
	for name, test := range map[string]struct {
		moves bool
		says  string
		times int
	}{
		"to another": {true, "msg=\"asked to connect to another replica\" reason=uneven addresses=[b:1]", 3},
		"nowhere":    {false, "--control-plane names no other", 1},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var said bytes.Buffer
				asked := 0
				run(t, &memory{}, func(stream syncStream, _ *resealv1.Hello) error {
					for range 3 {
						move := &resealv1.Move{Addresses: []string{"b:1"}, Reason: "uneven"}
						if err := stream.Send(&resealv1.SyncResponse{Message: &resealv1.SyncResponse_Move{Move: move}}); err != nil {
							return err
						}
					}
					return hold(stream)
				}, func(c *Config) {
					c.Logger = slog.New(slog.NewTextHandler(&said, nil))
					c.Move = func([]string) bool { asked++; return test.moves }
				})
				settle(0)
				if n := strings.Count(said.String(), test.says); asked != 3 || n != test.times {
					t.Errorf("asked %d times, said %d times:\n%s", asked, n, &said)
				}
			})
		})
	}
}

// Tries get rarer while streams fail, and soon again after a good one.
func TestBackoff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var good atomic.Bool
		h := run(t, &memory{}, func(stream syncStream, _ *resealv1.Hello) error {
			if good.Load() {
				minute := time.NewTimer(time.Minute)
				defer minute.Stop()
				select {
				case <-minute.C:
				case <-stream.Context().Done():
				}
			}
			return status.Error(codes.Unavailable, "no")
		})
		settle(10 * time.Minute)
		_, times := h.server.seen()
		if n := len(times); n < 60 || n > 140 {
			t.Errorf("%d tries in 10 minutes", n)
		}
		for i := 8; i < len(times); i++ {
			if gap := times[i].Sub(times[i-1]); gap < 5*time.Second || gap > 10*time.Second {
				t.Fatalf("try %d came after %s", i, gap)
			}
		}
		good.Store(true)
		settle(5 * time.Minute)
		_, times = h.server.seen()
		if gap := times[len(times)-1].Sub(times[len(times)-2]); gap > time.Minute+time.Second {
			t.Errorf("after a stream of a minute the next try came %s later", gap-time.Minute)
		}
	})
}

func TestLastGoodOverRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		state := &memory{slow: time.Second}
		a := encoded(t, "a", "a:1")
		first := run(t, state, func(stream syncStream, _ *resealv1.Hello) error {
			if _, err := send(stream, full(1, a)); err != nil {
				t.Error(err)
			}
			time.Sleep(state.slow / 2) // the first is being written
			if _, err := send(stream, full(2, encoded(t, "a", "a:2")), full(3, encoded(t, "a", "a:3"))); err != nil {
				t.Error(err)
			}
			return hold(stream)
		})
		settle(state.slow / 2)
		if first.Revision() != 3 {
			t.Fatal("applies wait for the disk")
		}
		first.stop() // waits for the newest to be written
		if state.written() != 2 {
			t.Errorf("%d writes, want the one under way and the newest", state.written())
		}
		second := run(t, state, func(stream syncStream, _ *resealv1.Hello) error { return hold(stream) })
		settle(0)
		hellos, _ := second.server.seen()
		if hellos[0].GetRevision() != 3 || string(hellos[0].GetHash()) != string(full(3, encoded(t, "a", "a:3")).Hash) {
			t.Errorf("said %v", hellos[0])
		}
		kept, err := second.LoadLastGood()
		if err != nil || kept.Revision() != 3 || kept.ClusterID() != "c" || kept.Get("BackendPool", "a").GetBackendPool().GetEndpoints()[0].GetAddress() != "a:3" {
			t.Errorf("kept %v, %v", kept, err)
		}
	})
}

func TestLastGoodWriteFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		state := &memory{err: errors.New("disk full")}
		h := run(t, state, func(stream syncStream, _ *resealv1.Hello) error {
			if _, err := send(stream, full(1, encoded(t, "a", "a:1"))); err != nil {
				t.Error(err)
			}
			return hold(stream)
		})
		settle(time.Minute)
		if h.Revision() != 1 {
			t.Error("a full disk held up the configuration")
		}
		state.fail(nil)
		settle(rewriteInterval)
		if state.written() != 1 {
			t.Errorf("%d writes after the repair", state.written())
		}
		settle(time.Minute)
		if state.written() != 1 {
			t.Errorf("%d writes of one content", state.written())
		}
	})
}

func TestDamagedLastGood(t *testing.T) {
	marshal := func(update *resealv1.Update) []byte {
		data, err := proto.Marshal(update)
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	a := encoded(t, "a", "a:1")
	wrongHash := full(1, a)
	wrongHash.Hash = []byte("x")
	for name, data := range map[string][]byte{
		"not protobuf": []byte("garbage"),
		"wrong hash":   marshal(wrongHash),
		"a delta":      marshal(on(1, 2, full(2, a).Hash, a)),
		"nothing":      {},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := run(t, &memory{files: map[string][]byte{lastGoodName: data}}, func(stream syncStream, hello *resealv1.Hello) error {
					if hello.GetRevision() != 0 {
						t.Errorf("said %v", hello)
					}
					_, err := send(stream, full(5, a))
					if err != nil {
						t.Error(err)
					}
					return hold(stream)
				})
				if _, err := h.LoadLastGood(); !errors.Is(err, ErrLastGood) {
					t.Errorf("LoadLastGood: %v", err)
				}
				settle(0)
				if kept, err := h.LoadLastGood(); err != nil || kept.Revision() != 5 {
					t.Errorf("after an update: %v", err)
				}
			})
		})
	}
	none := New(Config{State: &memory{}})
	if _, err := none.LoadLastGood(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("nothing kept: %v", err)
	}
}
