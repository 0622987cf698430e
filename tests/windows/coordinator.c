/* Plays VSS's coordinator towards the hardware provider, which it loads as a DLL (Wine has no proxies for VSS's interfaces): the calls come
 * through the tables of MinGW's vsprov.h, in VSS's order.
 *
 *   coordinator DLL whole|abort|two|stop-after-prepare NAA [NAA2]
 *
 * Prints one line for each call with its HRESULT; the last line is "ok" or "failed". Waits first until the provider supports the LUNs (its
 * registration with the target takes a moment). `whole` ends with LocateLuns and OnLunEmpty. */
#define COBJMACROS
#define INITGUID
#include <windows.h>
#include <initguid.h>
#include <vss.h>
#include <vsprov.h>
#include <stdio.h>

static const GUID class_of_provider = {0x1d6e4b52, 0x8f0a, 0x4a3b, {0x9a, 0x55, 0xc1, 0xf0, 0x7c, 0x2e, 0x84, 0xd3}};
typedef HRESULT(WINAPI *get_class_object)(REFCLSID, REFIID, void **);

struct lun { VDS_LUN_INFORMATION info; VDS_STORAGE_IDENTIFIER id; BYTE naa[16]; };
static IVssHardwareSnapshotProvider *hardware;
static IVssProviderCreateSnapshotSet *sets;
static VSS_PWSZ device = (VSS_PWSZ)L"\\\\?\\scsi#played";
static int failed;

static HRESULT say(const char *who, const char *call, HRESULT code)
{
    printf("%s %s %08lx\n", who, call, code);
    fflush(stdout);
    if (FAILED(code)) failed = 1;
    return code;
}

static void describe(struct lun *lun, const char *hex)
{
    unsigned byte, index;
    memset(lun, 0, sizeof *lun);
    for (index = 0; index < 16 && sscanf(hex + 2 * index, "%2x", &byte) == 1; index++) lun->naa[index] = byte;
    lun->id.m_CodeSet = VDSStorageIdCodeSetBinary, lun->id.m_Type = VDSStorageIdTypeFCPHName;
    lun->id.m_cbIdentifier = 16, lun->id.m_rgbIdentifier = lun->naa;
    lun->info.m_version = VER_VDS_LUN_INFORMATION, lun->info.m_BusType = VDSBusTypeiScsi;
    lun->info.m_szVendorId = (char *)"STILLPNT", lun->info.m_szProductId = (char *)"VIRTUAL-DISK";
    lun->info.m_szSerialNumber = (char *)"0001";
    lun->info.m_deviceIdDescriptor.m_version = 1, lun->info.m_deviceIdDescriptor.m_cIdentifiers = 1;
    lun->info.m_deviceIdDescriptor.m_rgIdentifiers = &lun->id;
}

static int supported(struct lun *lun)
{
    WINBOOL yes = FALSE;
    return SUCCEEDED(IVssHardwareSnapshotProvider_AreLunsSupported(hardware, 1, 0, &device, &lun->info, &yes)) && yes;
}

static int prepare(const char *who, GUID *set, struct lun *lun)
{
    GUID snapshot;
    CoCreateGuid(set), CoCreateGuid(&snapshot);
    return SUCCEEDED(say(who, "BeginPrepareSnapshot", IVssHardwareSnapshotProvider_BeginPrepareSnapshot(hardware, *set, snapshot, 0, 1, &device, &lun->info))) &&
           SUCCEEDED(say(who, "EndPrepareSnapshots", IVssProviderCreateSnapshotSet_EndPrepareSnapshots(sets, *set)));
}

static int take(const char *who, GUID set, struct lun *lun, VDS_LUN_INFORMATION *copy)
{
    DWORD began = GetTickCount();
    HRESULT code;
    if (FAILED(say(who, "PreCommitSnapshots", IVssProviderCreateSnapshotSet_PreCommitSnapshots(sets, set)))) return 0;
    code = say(who, "CommitSnapshots", IVssProviderCreateSnapshotSet_CommitSnapshots(sets, set));
    printf("%s commit-ms %lu\n", who, GetTickCount() - began);
    if (FAILED(code)) {
        say(who, "AbortSnapshots", IVssProviderCreateSnapshotSet_AbortSnapshots(sets, set));
        return 0;
    }
    memset(copy, 0, sizeof *copy);
    return SUCCEEDED(say(who, "PostCommitSnapshots", IVssProviderCreateSnapshotSet_PostCommitSnapshots(sets, set, 1))) &&
           SUCCEEDED(say(who, "GetTargetLuns", IVssHardwareSnapshotProvider_GetTargetLuns(hardware, 1, &device, &lun->info, copy)));
}

static void show(const char *who, VDS_LUN_INFORMATION *copy)
{
    VDS_STORAGE_IDENTIFIER *id = copy->m_deviceIdDescriptor.m_rgIdentifiers;
    ULONG index;
    printf("%s copy serial=%s naa=", who, copy->m_szSerialNumber);
    for (index = 0; id && index < id->m_cbIdentifier; index++) printf("%02x", id->m_rgbIdentifier[index]);
    printf("\n");
}

static void finish(const char *who, GUID set, VDS_LUN_INFORMATION *copy)
{
    show(who, copy);
    say(who, "LocateLuns", IVssHardwareSnapshotProvider_LocateLuns(hardware, 1, copy));
    say(who, "PreFinalCommitSnapshots", IVssProviderCreateSnapshotSet_PreFinalCommitSnapshots(sets, set));
    say(who, "PostFinalCommitSnapshots", IVssProviderCreateSnapshotSet_PostFinalCommitSnapshots(sets, set));
    say(who, "OnLunEmpty", IVssHardwareSnapshotProvider_OnLunEmpty(hardware, device, copy));
}

static int load(const char *path)
{
    IVssProviderNotifications *notifications = NULL;
    IClassFactory *factory = NULL;
    HMODULE module = LoadLibraryA(path);
    get_class_object get = module ? (get_class_object)(void *)GetProcAddress(module, "DllGetClassObject") : NULL;
    if (!get) { printf("no DLL %s: %lu\n", path, GetLastError()); return 0; }
    if (FAILED(say("load", "DllGetClassObject", get(&class_of_provider, &IID_IClassFactory, (void **)&factory)))) return 0;
    if (FAILED(say("load", "CreateInstance", IClassFactory_CreateInstance(factory, NULL, &IID_IVssHardwareSnapshotProvider, (void **)&hardware)))) return 0;
    if (FAILED(say("load", "QueryInterface", IVssHardwareSnapshotProvider_QueryInterface(hardware, &IID_IVssProviderCreateSnapshotSet, (void **)&sets)))) return 0;
    if (FAILED(say("load", "QueryInterface", IVssHardwareSnapshotProvider_QueryInterface(hardware, &IID_IVssProviderNotifications, (void **)&notifications)))) return 0;
    return SUCCEEDED(say("load", "OnLoad", IVssProviderNotifications_OnLoad(notifications, NULL)));
}

int main(int count, char **arguments)
{
    struct lun one, two;
    VDS_LUN_INFORMATION copy_one, copy_two;
    GUID set_one, set_two;
    const char *what;
    int tries;
    CoInitializeEx(NULL, COINIT_MULTITHREADED);
    if (count < 4 || !load(arguments[1])) { puts("failed"); return 1; }
    what = arguments[2];
    describe(&one, arguments[3]), describe(&two, count > 4 ? arguments[4] : arguments[3]);
    for (tries = 0; tries < 600 && !(supported(&one) && supported(&two)); tries++) Sleep(100);
    printf("supported %d\n", supported(&one));
    if (!strcmp(what, "whole")) {
        if (prepare("one", &set_one, &one) && take("one", set_one, &one, &copy_one)) finish("one", set_one, &copy_one);
    } else if (!strcmp(what, "abort")) {
        if (prepare("one", &set_one, &one)) {
            say("one", "AbortSnapshots", IVssProviderCreateSnapshotSet_AbortSnapshots(sets, set_one));
            say("one", "AbortSnapshots", IVssProviderCreateSnapshotSet_AbortSnapshots(sets, set_one));
        }
        if (prepare("two", &set_two, &two) && take("two", set_two, &two, &copy_two))
            say("two", "AbortSnapshots", IVssProviderCreateSnapshotSet_AbortSnapshots(sets, set_two));
    } else if (!strcmp(what, "two")) {
        if (prepare("one", &set_one, &one) && prepare("two", &set_two, &two) && take("two", set_two, &two, &copy_two) &&
            take("one", set_one, &one, &copy_one)) {
            finish("one", set_one, &copy_one);
            finish("two", set_two, &copy_two);
        }
    } else if (prepare("one", &set_one, &one)) {
        puts("prepared");
        fflush(stdout);
        getchar();
        take("one", set_one, &one, &copy_one);
    }
    puts(failed ? "failed" : "ok");
    fflush(stdout);
    ExitProcess(failed);
}
