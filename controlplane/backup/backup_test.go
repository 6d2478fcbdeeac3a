package backup

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/reseal/reseal/controlplane/etcd/etcdtest"
)

// plainCipher seals nothing, but checks contexts.
type plainCipher struct{}

func (plainCipher) Seal(plaintext, context []byte) ([]byte, error) {
	return slices.Concat(context, []byte("|"), plaintext), nil
}

func (plainCipher) Unseal(sealed, context []byte) ([]byte, error) {
	rest, ok := bytes.CutPrefix(sealed, append(slices.Clone(context), '|'))
	if !ok {
		return nil, errors.New("another context")
	}
	return rest, nil
}

// held lists what is below a prefix: key, value, and the keys that have its revision.
func held(t *testing.T, client *clientv3.Client, prefix string) []string {
	t.Helper()
	answer, err := client.Get(t.Context(), prefix, clientv3.WithPrefix())
	if err != nil {
		t.Fatal(err)
	}
	var revisions []int64
	for _, kv := range answer.Kvs {
		revisions = append(revisions, kv.ModRevision)
	}
	slices.Sort(revisions)
	revisions = slices.Compact(revisions)
	var list []string
	for _, kv := range answer.Kvs {
		order, _ := slices.BinarySearch(revisions, kv.ModRevision)
		list = append(list, fmt.Sprintf("%s=%d bytes at %d", kv.Key, len(kv.Value), order))
	}
	return list
}

func TestBackupAndRestore(t *testing.T) {
	from, to := etcdtest.New(t), etcdtest.New(t)
	put := func(keys ...string) {
		t.Helper()
		var ops []clientv3.Op
		for _, key := range keys {
			ops = append(ops, clientv3.OpPut("/a/"+key, string(bytes.Repeat([]byte(key), 20_000))))
		}
		if _, err := from.Txn(t.Context()).Then(ops...).Commit(); err != nil {
			t.Fatal(err)
		}
	}
	var want []string
	for i := range 150 {
		put("trust/"+fmt.Sprint(i), "z"+fmt.Sprint(i))
	}
	put("resources/a", "resources/b", "head", "history/1")
	put("resources/c", "head", "history/2")
	want = held(t, from, "/a/")
	lease, err := from.Grant(t.Context(), 600)
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{"/a/replicas/r", "/b/other"} {
		if _, err := from.Put(t.Context(), key, "x", clientv3.WithLease(lease.ID)); err != nil {
			t.Fatal(err)
		}
	}
	var file bytes.Buffer
	keys, err := Write(t.Context(), from, "/a/", plainCipher{}, &file)
	if err != nil || keys != len(want) {
		t.Fatalf("%d keys, want %d: %v", keys, len(want), err)
	}

	limits := Limits{Ops: 128, Bytes: 1 << 20}
	for name, damaged := range map[string][]byte{
		"cut":       file.Bytes()[:file.Len()-1],
		"cut frame": file.Bytes()[:len(magic)+16],
		"longer":    append(slices.Clone(file.Bytes()), 0),
		"other":     []byte("hello"),
		"changed":   bytes.Replace(slices.Clone(file.Bytes()), []byte("|["), []byte("|{"), 1),
	} {
		if _, err := Restore(t.Context(), to, "/a/", plainCipher{}, limits, bytes.NewReader(damaged)); err == nil {
			t.Errorf("%s: it is restored", name)
		}
	}
	if got := held(t, to, "/"); len(got) != 0 {
		t.Fatalf("a damaged file leaves %v", got)
	}
	restored, err := Restore(t.Context(), to, "/a/", plainCipher{}, limits, bytes.NewReader(file.Bytes()))
	if err != nil || restored != keys {
		t.Fatalf("%d keys: %v", restored, err)
	}
	if got := held(t, to, "/"); !slices.Equal(got, want) {
		t.Errorf("restored\n%v\nwant\n%v", got, want)
	}
	if _, err := Restore(t.Context(), to, "/a/", plainCipher{}, limits, bytes.NewReader(file.Bytes())); !errors.Is(err, ErrNotEmpty) {
		t.Errorf("into a store that holds something: %v", err)
	}

	// One that is interrupted is not taken for a whole one.
	interrupted, stop := context.WithCancel(t.Context())
	stop()
	if _, err := Restore(interrupted, to, "/c/", plainCipher{}, limits, bytes.NewReader(file.Bytes())); err == nil {
		t.Error("it is not interrupted")
	}
	if _, err := to.Put(t.Context(), "/c/"+restoring, "x"); err != nil {
		t.Fatal(err)
	}
	if err := Check(t.Context(), to, "/c/"); !errors.Is(err, ErrUnfinished) {
		t.Errorf("an unfinished one: %v", err)
	}
	if err := Check(t.Context(), to, "/a/"); err != nil {
		t.Errorf("a finished one: %v", err)
	}
}

// TestSmallerTransactions: a change that this store takes in several has its head and
// its record in one.
func TestSmallerTransactions(t *testing.T) {
	var entries []entry
	for i := range 9 {
		entries = append(entries, entry{Key: fmt.Sprint("resources/", i), Revision: 7})
	}
	entries = append(entries, entry{Key: "head", Revision: 7}, entry{Key: "history/1", Revision: 7}, entry{Key: "z", Revision: 8})
	for ops := 3; ops < 15; ops++ {
		var sizes []int
		for rest := entries; len(rest) > 0; {
			n := Limits{Ops: ops, Bytes: 1000}.next("/", rest)
			if last := rest[n-1]; n == 0 || n > ops-1 || last.Key == "head" {
				t.Fatalf("%d operations: %d, the last of them %s", ops, n, last.Key)
			}
			sizes = append(sizes, n)
			rest = rest[n:]
		}
		if sizes[len(sizes)-1] != 1 {
			t.Errorf("%d operations: %v", ops, sizes)
		}
	}
}
