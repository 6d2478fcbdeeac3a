package plan

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// compiler is the state of one Compile.
type compiler struct {
	snapshot     *resealv1.Snapshot
	env          Env
	files        map[string]file
	certificates map[string]*certificate // by name, nil when broken
	policies     map[string]*policy      // by name, "" for the default; nil when broken
	violations   []*resealv1.Violation
	warnings     []*resealv1.Violation
}

// file is what reading a file gave.
type file struct {
	data []byte
	err  error
}

var errNoFiles = errors.New("this edge reads no files")

// readFile reads each file once, so that all users see the same content.
func (c *compiler) readFile(name string) ([]byte, error) {
	if seen, ok := c.files[name]; ok {
		return seen.data, seen.err
	}
	var read file
	if c.env.ReadFile == nil {
		read.err = errNoFiles
	} else {
		read.data, read.err = c.env.ReadFile(name)
	}
	c.files[name] = read
	return read.data, read.err
}

// fileProblem says why a file can't be used, without repeating its name.
func fileProblem(err error) string {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "does not exist on this edge"
	case errors.Is(err, fs.ErrPermission):
		return "may not be read by this edge"
	}
	var pathError *fs.PathError
	if errors.As(err, &pathError) {
		err = pathError.Err
	}
	return "can't be read: " + err.Error()
}

// object is the resource whose fields are being checked.
type object struct {
	c   *compiler
	ref *resealv1.ResourceRef
	uid string
}

func (c *compiler) object(r *resealv1.Resource) object {
	return object{c: c, ref: r.Ref(), uid: r.GetMetadata().GetUid()}
}

func (o object) refuse(field, format string, args ...any) {
	o.c.violations = append(o.c.violations, o.violation(field, format, args...))
}

func (o object) warn(field, format string, args ...any) {
	o.c.warnings = append(o.c.warnings, o.violation(field, format, args...))
}

func (o object) violation(field, format string, args ...any) *resealv1.Violation {
	return &resealv1.Violation{Resource: o.ref, Field: field, Description: fmt.Sprintf(format, args...)}
}

// exists checks a reference.
func (o object) exists(field, kind, name string) bool {
	if o.c.snapshot.Get(kind, name) != nil {
		return true
	}
	o.refuse(field, "there is no %s %q", kind, name)
	return false
}

func (o object) prefixes(field string, cidrs []string) {
	for i, cidr := range cidrs {
		if _, err := netip.ParsePrefix(cidr); err != nil {
			o.refuse(fmt.Sprintf("%s[%d]", field, i), "%q is no CIDR, for example 10.0.0.0/8 or 192.0.2.7/32", cidr)
		}
	}
}

// hostPort checks host:port. The port may be 0 only where the system chooses.
func (o object) hostPort(field, address string, emptyHost, portZero bool) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		o.refuse(field, "%q is not host:port", address)
		return
	}
	if number, err := strconv.ParseUint(port, 10, 16); err != nil || number == 0 && !portZero {
		o.refuse(field, "%q has no port from 1 to 65535", address)
	}
	if host == "" && !emptyHost || host != "" && !validName(strings.ToLower(host)) && !isIP(host) {
		o.refuse(field, "%q has no host name or IP address before the port", address)
	}
}

// timeout checks a duration that must be positive when set.
func (o object) timeout(field string, d *durationpb.Duration) {
	if d == nil {
		return
	}
	if err := d.CheckValid(); err != nil || d.AsDuration() <= 0 {
		o.refuse(field, "must be longer than 0s")
	}
}

func (o object) enum(field string, value int32, names map[int32]string) {
	if _, ok := names[value]; !ok {
		o.refuse(field, "this edge does not know the value %d", value)
	}
}

func isIP(host string) bool {
	_, err := netip.ParseAddr(host)
	return err == nil
}

// duration is 0 for an absent field.
func duration(d *durationpb.Duration) time.Duration {
	if d == nil {
		return 0
	}
	return d.AsDuration()
}
