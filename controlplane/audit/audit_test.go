package audit

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	"github.com/reseal/reseal/controlplane/etcd/etcdtest"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type userKey struct{}

func as(ctx context.Context, user string) context.Context {
	return context.WithValue(ctx, userKey{}, user)
}

func newLog(t *testing.T, client *clientv3.Client, file string) *Log {
	t.Helper()
	return New(Config{Client: client, File: file, Caller: func(ctx context.Context) string {
		user, _ := ctx.Value(userKey{}).(string)
		return user
	}})
}

// run has a log follow until stop is called.
func run(t *testing.T, l *Log) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- l.Run(ctx) }()
	var once sync.Once
	stop = func() {
		once.Do(func() {
			cancel()
			if err := <-ended; err != nil {
				t.Error(err)
			}
		})
	}
	t.Cleanup(stop)
	return stop
}

// entries reads all that there are.
func entries(t *testing.T, l *Log) []*resealv1.AuditEntry {
	t.Helper()
	var all []*resealv1.AuditEntry
	err := (&reader{log: l, next: 1}).all(t.Context(), func(found []stored) error {
		for _, s := range found {
			all = append(all, s.AuditEntry)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func entry(user string) *resealv1.AuditEntry {
	return &resealv1.AuditEntry{User: user, Action: "S.Do", Outcome: "OK"}
}

func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(15 * time.Second); !condition(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within 15 s", what)
		}
	}
}

// TestChain: entries of several replicas at once are numbered and follow each other;
// one that is changed, removed or put in is found.
func TestChain(t *testing.T) {
	client := etcdtest.New(t)
	var writers sync.WaitGroup
	for i := range 4 {
		l := newLog(t, client, "")
		writers.Go(func() {
			for j := range 10 {
				if err := l.Append(t.Context(), entry(fmt.Sprintf("admin/a%d-%d", i, j))); err != nil {
					t.Error(err)
				}
			}
		})
	}
	writers.Wait()
	l := newLog(t, client, "")
	all := entries(t, l)
	if len(all) != 40 {
		t.Fatalf("%d entries", len(all))
	}
	for i, e := range all {
		if e.GetNumber() != uint64(i+1) || e.GetBroken() || i > 0 && e.GetPrevious() != all[i-1].GetHash() {
			t.Errorf("entry %d: %v", i, e)
		}
	}
	broken := func() (numbers []uint64) {
		for _, e := range entries(t, l) {
			if e.GetBroken() {
				numbers = append(numbers, e.GetNumber())
			}
		}
		return numbers
	}
	found, err := client.Get(t.Context(), l.entryKey(7))
	if err != nil {
		t.Fatal(err)
	}
	record := found.Kvs[0].Value
	for what, tamper := range map[string]func() error{
		"changed": func() error {
			_, err := client.Put(t.Context(), l.entryKey(7), strings.Replace(string(record), "S.Do", "S.Be", 1))
			return err
		},
		"removed":    func() error { _, err := client.Delete(t.Context(), l.entryKey(7)); return err },
		"unreadable": func() error { _, err := client.Put(t.Context(), l.entryKey(7), "x"); return err },
	} {
		if err := tamper(); err != nil {
			t.Fatal(err)
		}
		if got := broken(); len(got) == 0 {
			t.Errorf("%s: not found", what)
		}
		if _, err := client.Put(t.Context(), l.entryKey(7), string(record)); err != nil {
			t.Fatal(err)
		}
	}
	if got := broken(); len(got) != 0 {
		t.Errorf("broken as it was: %v", got)
	}
}

// TestFile: each line is a record, whose SHA-256 the next one names; what was made
// while nobody followed is written later, once.
func TestFile(t *testing.T) {
	client := etcdtest.New(t)
	path := filepath.Join(t.TempDir(), "audit.json")
	other := newLog(t, client, "")
	add := func(user string) {
		t.Helper()
		if err := other.Append(t.Context(), entry(user)); err != nil {
			t.Fatal(err)
		}
	}
	lines := func() [][]byte {
		text, _ := os.ReadFile(path)
		return bytes.Split(bytes.TrimSuffix(text, []byte("\n")), []byte("\n"))
	}
	wait := func(n int) {
		t.Helper()
		eventually(t, fmt.Sprintf("%d lines", n), func() bool { got := lines(); return len(got) == n && len(got[0]) > 0 })
	}
	add("admin/one")
	stop := run(t, newLog(t, client, path))
	wait(1)
	add("admin/two")
	wait(2)
	stop()
	add("admin/three")
	run(t, newLog(t, client, path))
	wait(3)
	add("admin/four")
	wait(4)
	previous := ""
	for i, line := range lines() {
		var e struct{ Number, Previous, User string }
		if err := json.Unmarshal(line, &e); err != nil || e.Number != fmt.Sprint(i+1) || e.Previous != previous {
			t.Errorf("line %d: %s, %v, want previous %q", i, line, err, previous)
		}
		sum := sha256.Sum256(line)
		previous = hex.EncodeToString(sum[:])
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	// Moved away, as logrotate does.
	if err := os.Rename(path, path+".1"); err != nil {
		t.Fatal(err)
	}
	add("admin/five")
	wait(1)
}

// TestRefusedAreBounded: calls that come to nothing can't push out what happened.
func TestRefusedAreBounded(t *testing.T) {
	client := etcdtest.New(t)
	l := newLog(t, client, "")
	run(t, l)
	for range 1000 {
		l.Refused(t.Context(), "anonymous", "/reseal.v1.AdminService/List", status.Error(codes.Unauthenticated, "no certificate"))
	}
	l.Refused(t.Context(), "viewer/v", "/reseal.v1.AdminService/Apply", status.Error(codes.PermissionDenied, "not you"))
	eventually(t, "recorded", func() bool { return len(entries(t, l)) == anonymousBurst+1 })
	last := entries(t, l)[anonymousBurst]
	if last.GetUser() != "viewer/v" || last.GetAction() != "AdminService.Apply" || last.GetOutcome() != "PERMISSION_DENIED" || last.GetError() != "not you" ||
		last.GetSuppressed() != 1000-anonymousBurst {
		t.Errorf("wrong entry %v", last)
	}
}

func TestCallsAreRecorded(t *testing.T) {
	client := etcdtest.New(t)
	l := newLog(t, client, "")
	run(t, l)
	call := func(user, method string, request any, err error) {
		t.Helper()
		_, got := l.UnaryInterceptor(as(t.Context(), user), request, &grpc.UnaryServerInfo{FullMethod: method},
			func(context.Context, any) (any, error) { return nil, err })
		if !proto.Equal(status.Convert(got).Proto(), status.Convert(err).Proto()) {
			t.Errorf("the error became %v", got)
		}
	}
	call("admin/a", resealv1.EnrollmentService_RevokeUser_FullMethodName, &resealv1.RevokeUserRequest{Name: "vera", Reason: "left us"}, nil)
	call("operator/o", resealv1.KeyringService_Rotate_FullMethodName, &resealv1.RotateRequest{}, nil)
	call("admin/a", resealv1.KeyringService_Revoke_FullMethodName, &resealv1.RevokeRequest{DryRun: true}, nil)
	call("replica/r", resealv1.FleetService_DrainEdge_FullMethodName, &resealv1.DrainEdgeRequest{Id: "e1"}, nil)
	call("viewer/v", resealv1.AdminService_List_FullMethodName, &resealv1.ListRequest{}, nil)
	call("admin/a", resealv1.EnrollmentService_RevokeUser_FullMethodName, &resealv1.RevokeUserRequest{Name: "x"}, status.Error(codes.NotFound, "no user"))
	eventually(t, "recorded", func() bool { return len(entries(t, l)) == 3 })
	var got []string
	for _, e := range entries(t, l) {
		got = append(got, strings.Join([]string{e.GetUser(), e.GetAction(), e.GetResources()[0].GetResource(), e.GetMessage(), e.GetOutcome()}, " "))
	}
	want := "admin/a EnrollmentService.RevokeUser user/vera left us OK\noperator/o KeyringService.Rotate keyring/default  OK\n" +
		"admin/a EnrollmentService.RevokeUser user/x  NOT_FOUND"
	if strings.Join(got, "\n") != want {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), want)
	}
}

// TestEveryMethodIsDecidedOn: a new method either changes something, and is recorded,
// or stands here.
func TestEveryMethodIsDecidedOn(t *testing.T) {
	silent := map[protoreflect.FullName]bool{}
	for _, name := range strings.Fields(`
		AdminService.Apply AdminService.Delete AdminService.Rollback
		AdminService.Get AdminService.List AdminService.Watch AdminService.ListRevisions AdminService.ReadAudit
		FleetService.ListEdges FleetService.WatchEdges FleetService.ListReplicas FleetService.ProbeBackend FleetService.PreviewChange
		FleetService.ListFailures FleetService.ObserveRequests FleetService.GetRollout FleetService.WatchRollout KeyringService.Status
		TallyService.GetStats TallyService.WatchStats EnrollmentService.ListTokens EnrollmentService.ListUsers EnrollmentService.ListRevocations
		FeedService.Sync KeyringService.Hold TallyService.Report SessionService.Exchange PreviewService.Preview LinkService.Connect ObservationService.Observe
		ReplicaService.Relay EnrollmentService.Renew`) {
		silent[protoreflect.FullName("reseal.v1."+name)] = true
	}
	protoregistry.GlobalFiles.RangeFilesByPackage("reseal.v1", func(file protoreflect.FileDescriptor) bool {
		for i := range file.Services().Len() {
			for j := range file.Services().Get(i).Methods().Len() {
				method := file.Services().Get(i).Methods().Get(j)
				name := "/" + string(method.Parent().FullName()) + "/" + string(method.Name())
				if (about[name] != nil) == silent[method.FullName()] {
					t.Errorf("%s: recorded %v, silent %v", method.FullName(), about[name] != nil, silent[method.FullName()])
				}
			}
		}
		return true
	})
}

func TestEntriesAreBounded(t *testing.T) {
	client := etcdtest.New(t)
	l := newLog(t, client, "")
	big := entry("admin/" + strings.Repeat("é", 5000))
	big.Message = strings.Repeat("m", 1<<20)
	for i := range 1000 {
		big.Resources = append(big.Resources, &resealv1.AuditedResource{Resource: fmt.Sprint("BackendPool/", i, strings.Repeat("x", 200)),
			Change: "configured", Before: strings.Repeat("0", 64), After: strings.Repeat("1", 64), Diff: strings.Repeat("+\"<&\n", 10_000)})
	}
	_, ops, err := l.Extend(t.Context(), big)
	if err != nil {
		t.Fatal(err)
	}
	if size := len(ops[0].ValueBytes()); size > MaxEntry {
		t.Errorf("%d bytes", size)
	}
	if kept := len(big.GetResources()); kept == 0 || kept+int(big.GetMoreResources()) != 1000 {
		t.Errorf("%d resources and %d more", kept, big.GetMoreResources())
	}
}

func TestTrim(t *testing.T) {
	client := etcdtest.New(t)
	l := newLog(t, client, "")
	for _, number := range []uint64{1, 2, 3, Limit + 2} {
		if _, err := client.Put(t.Context(), l.entryKey(number), "{}"); err != nil {
			t.Fatal(err)
		}
	}
	l.trim(t.Context(), Limit+2)
	left, err := client.Get(t.Context(), l.entryKey(0), clientv3.WithRange(l.entryKey(1<<62)))
	if err != nil || len(left.Kvs) != 2 || string(left.Kvs[0].Key) != l.entryKey(3) {
		t.Errorf("left are %v, %v", left.Kvs, err)
	}
}
